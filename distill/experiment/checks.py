"""Checks that a model can do what the experiment asks of it."""

from __future__ import annotations

from typing import Any

from distill.errors import UserError
from distill.experiment.configuration import Experiment
from distill.models.contract import checked_head, not_finite, try_model
from distill.models.isolation import LENGTH, Rows, find_fault


def offered_options(experiment: Experiment, device: str, vocab_size: int, first_samples: Any = None) -> dict[str, Any]:
    """Return the arguments that a student's constructor gets if it names them and the user has not given them."""
    return {
        "vocab_size": vocab_size,
        "sequence_length": experiment.corpus.sequence_length,
        "teacher": experiment.teacher.model,
        # A teacher that the user gives among the options is another one, with a revision of its own.
        "teacher_revision": None if "teacher" in experiment.student.options else experiment.teacher.revision,
        "device": device,
        "first_samples": first_samples,
    }


def check_model(
    model: Any, name: str, vocab_size: int, pack: bool, *, length: int = LENGTH, trains: bool = False
) -> None:
    """Raise UserError if a model breaks the contract of body and head, on a few tokens, at most `length` a row.

    The head has too few rows, the code fails, outputs are not finite, or a position sees what it must not. Isolation
    cannot be measured on values that are not finite, so these are found first. `pack`: documents share rows. `trains`:
    it is a student before its training. The model is tried where its weights are: such a student is on the host.
    """
    device = checked_head(model, name, vocab_size).weight_VD.device
    length = min(length, LENGTH)
    rows = Rows.make(vocab_size, length, pack, device)
    logits_BLV = try_model(model, name, rows.ids_BL, rows.positions_BL, vocab_size, trains=trains)
    if not logits_BLV.isfinite().all():
        raise UserError(f"{name}: {not_finite(logits_BLV.dtype)}")
    if (fault := find_fault(model, vocab_size, device, pack=pack, length=length)) is not None:
        raise UserError(f"{name}: {fault.value}")


def check_length(limit: int | None, name: str, sequence_length: int) -> None:
    """Raise UserError if samples are longer than the `limit` tokens that a model says it can read."""
    if limit is not None and sequence_length > limit:
        raise UserError(f"corpus.sequence_length: {sequence_length} is beyond the {limit} tokens of {name}")
