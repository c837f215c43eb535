"""A fresh student of the experiment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distill import plugins
from distill.cache.reading.reader import CacheReader
from distill.errors import UserError
from distill.experiment.configuration import Experiment
from distill.models import devices
from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.vocabulary import Vocabulary

Calibration = Callable[[int], tuple[Tensor, Tensor, Tensor]]
"""count -> token ids, position ids and loss mask `[count, L]` of the first training samples."""


def calibration_samples(reader: CacheReader) -> Calibration:
    """The first training samples, for students that look at text while they are made."""

    def first(count: int) -> tuple[Tensor, Tensor, Tensor]:
        batch = reader.collate([reader[index] for index in range(min(count, len(reader)))])
        return batch.input_ids_BL, batch.position_ids_BL, batch.loss_mask_BL

    return first


def build_student(
    experiment: Experiment, vocab_size: int, calibration: Calibration, vocabulary: Vocabulary | None = None
) -> tuple[Any, dict[str, Any]]:
    """A fresh student from the experiment's seed, and the complete options it was made with.

    With a `vocabulary` it has these of the teacher's tokens alone: made so, or trimmed.
    """
    device = str(devices.pick_device(experiment.train.accelerator))
    offered = offered_options(experiment, vocab_size if vocabulary is None else len(vocabulary), calibration, device)
    student = experiment.student
    options = plugins.arguments(student.class_path, "student", student.options, offered)
    torch.manual_seed(experiment.train.seed)
    model = plugins.build(student.class_path, "student", options, {})
    if vocabulary is not None:
        _trim(model, f"student {student.class_path}", vocabulary)
    return model, options


def offered_options(
    experiment: Experiment, vocab_size: int, calibration: Calibration | None, device: str
) -> dict[str, Any]:
    """What a student's constructor gets when it asks for it by name, and the user has not given it."""
    return {
        "vocab_size": vocab_size,
        "sequence_length": experiment.corpus.sequence_length,
        "teacher": experiment.teacher.model,
        # Of that one: another one that the user gives has its own.
        "teacher_revision": None if "teacher" in experiment.student.options else experiment.teacher.revision,
        "calibration": calibration,
        "device": device,
    }


def _trim(model: Any, name: str, vocabulary: Vocabulary) -> None:
    """Cut a student of all the teacher's tokens down to the kept ones; one made with these alone has them already.

    Raises UserError for a head of any other size, whose rows are another tokenizer's tokens, and for students that
    would be cut and could not be made again so from their options.
    """
    rows, kept, full = model.head.weight_VD.shape[0], len(vocabulary), vocabulary.full_size
    if rows == kept or rows >= full == kept:
        return
    if rows < full:
        raise UserError(
            f"{name}: its head has {rows} rows; student.vocabulary corpus takes all of the teacher's {full} tokens, to "
            f"be trimmed, or the {kept} kept ones: set no size for a fresh student; a pretrained one of another "
            "tokenizer cannot learn from this teacher"
        )
    if not isinstance(model, HuggingFaceLanguageModel):
        raise UserError(
            f"{name}: its head has all of the teacher's tokens, and only Hugging Face models are trimmed: build it "
            "with the vocab_size that it is given, or use --student.vocabulary full"
        )
    model.keep_tokens(vocabulary.kept_ids)
