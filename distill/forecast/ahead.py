"""A look at the student before the teacher's hours: its files, its tokens, and a fresh student itself."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from distill import plugins
from distill.errors import UserError
from distill.experiment.checks import offered_options
from distill.experiment.configuration import Experiment
from distill.experiment.last_steps import check_tokenizer
from distill.experiment.place import Place
from distill.experiment.student import Pretrained, check_tokens, make_student_to_train
from distill.forecast.child import Child
from distill.forecast.machine.calibration import kind_of
from distill.forecast.machine.cards import Card
from distill.forecast.models import Models, size_of
from distill.forecast.simulation.fake import without_memory
from distill.models import checkpoints
from distill.models.checkpoints import Checkpoint
from distill.system.quiet import quiet
from distill.system.units import size

_SHARE = 0.5
"""Largest share of the free memory that a student may take which is made for a look."""
_LATE = "it is tried only when its training begins"


def check_student_ahead(experiment: Experiment, card: Card, *, with_weights: bool) -> str | None:
    """Raise UserError for a student that its training would refuse before the first step.

    A built-in is made without memory; a fresh student that this machine holds is made, and tried for the contract of
    body and head, such as a position that sees the future. `with_weights`: so is a pretrained one whose files
    are here. (A pruned one is of the teacher's family, and the teacher is tried when it is loaded.)
    Returns a line about a student that is not tried until its training begins.
    """
    if (pretrained := Pretrained.of(experiment)) is not None and (checkpoint := _with_weights(pretrained)) is not None:
        checkpoints.weight_files(checkpoint)
    child = Child(partial(_check, card, with_weights))
    try:
        reason = child(experiment)
    except RuntimeError as error:
        reason = f"{_LATE}: {error}"
    finally:
        child.close()
    return f"student {experiment.student.class_path}: {reason}" if reason else None


def check_tokens_ahead(experiment: Experiment, tokenizer: Any) -> None:
    """Raise UserError if the teacher's tokenizer, which is here by now, is not one for the experiment.

    Benchmarks must be able to begin a text with it, and a pretrained student that is here must have the same tokens.
    """
    check_tokenizer(experiment, tokenizer)
    pretrained = Pretrained.of(experiment)
    if pretrained is not None and (checkpoint := _checkpoint_of(pretrained)) is not None:
        check_tokens(experiment, replace(Place.host(), find=lambda *_: checkpoint), tokenizer)


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


def _is_local(pretrained: Pretrained) -> bool:
    return Path(pretrained.name).expanduser().exists() or pretrained.name == checkpoints.DEMO_NAME


def _checkpoint_of(pretrained: Pretrained) -> Checkpoint | None:
    """Return a pretrained student's checkpoint: the user's own, or as much of a hub's as is on this machine."""
    if _is_local(pretrained):
        return checkpoints.resolve(pretrained.name)
    return checkpoints.kept(pretrained.name, pretrained.revision)


def _with_weights(pretrained: Pretrained) -> Checkpoint | None:
    """Return a pretrained student's checkpoint: the user's own, or a hub's whose weights are on this machine."""
    checkpoint = _checkpoint_of(pretrained)
    is_there = checkpoint is not None and (_is_local(pretrained) or checkpoints.has_weights(checkpoint))
    return checkpoint if is_there else None


def _check(card: Card, with_weights: bool, experiment: Experiment) -> str | None:
    """Make and try the student. Return the reason if that cannot be done here and now."""
    models = Models(experiment, card, [])
    models.check_tokens()
    needed, free = _made_without_memory(models, card), psutil.virtual_memory().available
    name, options = experiment.student.class_path, experiment.student.options
    arguments = plugins.arguments(name, "student", options, offered_options(experiment, "cpu", 0))
    for argument in ("first_samples", "teacher"):
        if argument in arguments:
            return None if plugins.is_built_in(name, "student") else f"{_LATE}: its constructor takes {argument}"
    pretrained = Pretrained.of(experiment)
    if pretrained is not None:
        checkpoint = _with_weights(pretrained)
        if checkpoint is None:
            remedy = f"`hf download {pretrained.name}` before the start has it tried then"
            return f"{_LATE}: {pretrained.name} is not on this machine yet ({remedy})"
        if not with_weights:
            return "a plan does not load its weights: `distill run` tries them before the teacher"
        # From its folder nothing is looked up on the hub.
        student = replace(experiment.student, options={**options, pretrained.option: str(checkpoint.path)})
        experiment = replace(experiment, student=student)
    if needed >= _SHARE * free:
        return f"{_LATE}: it takes {size(needed)} of the {size(free)} that are free in this machine's memory"
    with quiet():
        make_student_to_train(experiment, Place.host(), models.vocab_size)
    return None


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
