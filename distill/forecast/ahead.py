"""A look at the student before the teacher's hours: its files and tokens, and the student itself without memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from distill import plugins
from distill.errors import UserError
from distill.experiment.configuration import Experiment
from distill.forecast.child import Child
from distill.forecast.machine.calibration import kind_of
from distill.forecast.machine.cards import Card
from distill.forecast.models import Models, size_of
from distill.forecast.simulation.fake import without_memory
from distill.models import checkpoints
from distill.system.quiet import quiet


def check_student_ahead(experiment: Experiment, card: Card) -> None:
    """Raise UserError for a student that its training would refuse on its options, configuration and files alone."""
    _check_weights(experiment)
    child = Child(partial(_check, card))
    try:
        child(experiment)
    except RuntimeError:
        return  # the child was killed, so nothing is known
    finally:
        child.close()


def student_sizes(experiment: Experiment, card: Card) -> dict[str, int] | None:
    """Return the sizes of the student, as `size_of` has them, or None for one that cannot be made without memory."""
    child = Child(partial(_sizes, card))
    try:
        return child(experiment)
    except Exception:  # whatever is the matter with a student, its own checks say
        return None
    finally:
        child.close()


def _sizes(card: Card, experiment: Experiment) -> dict[str, int]:
    with quiet(), without_memory(kind_of(card)):
        return size_of(Models(experiment, card, []).student_to_train())


def _check_weights(experiment: Experiment) -> None:
    """Raise UserError for a pretrained student in a local folder or file that no weights can be read from."""
    student = experiment.student
    option = plugins.declared(student.class_path, "student", "pretrained")
    name = student.options.get(option) if option else None
    if isinstance(name, str) and Path(name).expanduser().exists():
        checkpoints.weight_files(checkpoints.resolve(name))


def _check(card: Card, experiment: Experiment) -> None:
    """Make a built-in student. One of the user's own may need real tensors or samples while it is made."""
    models = Models(experiment, card, [])
    models.check_tokens()
    if experiment.student.class_path not in plugins.BUILT_IN["student"]:
        return
    try:
        with quiet(), without_memory(kind_of(card)):
            models.student_to_train()
    except UserError:
        raise
    except Exception:  # without memory a model may fail in ways that it does not on a device
        return
