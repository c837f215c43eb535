"""A look at the student before the teacher's hours: its files, its tokens, and a fresh student itself."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import psutil

from distill import plugins
from distill.errors import UserError
from distill.experiment.checks import offered_options
from distill.experiment.configuration import Experiment
from distill.experiment.place import Place
from distill.experiment.student import make_student_to_train
from distill.forecast.child import Child
from distill.forecast.machine.calibration import kind_of
from distill.forecast.machine.cards import Card
from distill.forecast.models import Models, size_of
from distill.forecast.simulation.fake import without_memory
from distill.models import checkpoints
from distill.system.quiet import quiet

_SHARE = 0.5
"""Largest share of the free memory that a student may take which is made for a look."""


def check_student_ahead(experiment: Experiment, card: Card, *, with_weights: bool) -> None:
    """Raise UserError for a student that its training would refuse before the first step.

    A built-in is made without memory; a fresh student that this machine holds is made, and tried for the contract of
    body and head, such as packed documents that see one another. `with_weights`: so is a pretrained one whose folder
    is here. (A pruned one is of the teacher's family, and the teacher is tried when it is loaded.)
    """
    _check_weights(experiment)
    child = Child(partial(_check, card, with_weights))
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


def _check(card: Card, with_weights: bool, experiment: Experiment) -> None:
    models = Models(experiment, card, [])
    models.check_tokens()
    needed = _made_without_memory(models, card)
    if _can_be_made(experiment, with_weights) and needed < _SHARE * psutil.virtual_memory().available:
        with quiet():
            make_student_to_train(experiment, Place.host(), models.vocab_size)


def _made_without_memory(models: Models, card: Card) -> int:
    """Return the bytes of the student's weights; 0 for a class of the user's own that needs real tensors."""
    try:
        with quiet(), without_memory(kind_of(card)):
            return size_of(models.student_to_train())["bytes"]
    except UserError:
        if plugins.is_built_in(models.experiment.student.class_path, "student"):
            raise
        return 0
    except Exception:  # without memory a model may fail in ways that it does not on a device
        return 0


def _can_be_made(experiment: Experiment, with_weights: bool) -> bool:
    """Tell whether a student is made of its options, or also of weights that are here: of no samples of the cache."""
    name, options = experiment.student.class_path, experiment.student.options
    arguments = plugins.arguments(name, "student", options, offered_options(experiment, "cpu", 0))
    if "first_samples" in arguments or "teacher" in arguments:
        return False
    weights = arguments.get(plugins.declared(name, "student", "pretrained"))
    return weights is None or (with_weights and Path(weights).expanduser().exists())
