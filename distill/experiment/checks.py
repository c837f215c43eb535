"""Checks that a model can do what the experiment asks of it."""

from __future__ import annotations

from typing import Any

from distill.errors import UserError
from distill.experiment.configuration import Experiment
from distill.experiment.folders import Folders
from distill.models.contract import checked_head, not_finite, try_model
from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.isolation import LENGTH, Fault, Rows, find_fault
from distill.models.language_model import ONE_DOCUMENT_A_ROW
from distill.system.progress import say

_REMEDY = (
    "attention keeps them apart by a mask made of position_ids, as document_mask of students/compact.py is; a "
    "recurrent state cannot"
)


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
        "measured": str(Folders.of(experiment).measured),
    }


def check_model(
    model: Any,
    name: str,
    vocab_size: int,
    pack: bool,
    *,
    length: int = LENGTH,
    trains: bool = False,
    tells: bool = True,
) -> bool:
    """Raise UserError if a model breaks the contract of body and head, on a few tokens, at most `length` a row.

    A model in which packed documents see one another gets each in a row of its own from here on. That is said, if the
    check `tells`, and returned, for other copies of the same model: see `run_apart`.

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
    fault = find_fault(model, vocab_size, device, pack=pack, length=length)
    apart = fault is Fault.DOCUMENTS
    if apart:
        run_apart(model)
        fault = find_fault(model, vocab_size, device, pack=pack, length=length)
    if fault is not None:
        raise UserError(f"{name}: {fault.value}")
    if apart and tells:
        remedy = "" if isinstance(model, HuggingFaceLanguageModel) else f" ({_REMEDY})"
        say(
            f"{name}: documents that share a row would see one another in this model: each is read in a row of its own"
            f"{remedy}"
        )
    return apart


def run_apart(model: Any) -> None:
    """Make a model read each document of a packed batch in a row of its own."""
    setattr(model, ONE_DOCUMENT_A_ROW, True)


def check_length(limit: int | None, name: str, sequence_length: int) -> None:
    """Raise UserError if samples are longer than the `limit` tokens that a model says it can read."""
    if limit is not None and sequence_length > limit:
        raise UserError(f"corpus.sequence_length: {sequence_length} is beyond the {limit} tokens of {name}")
