"""A fresh student of the experiment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distill import plugins
from distill.cache.reader import CacheReader
from distill.config import Experiment
from distill.errors import UserError
from distill.models import devices
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
    rows = vocab_size if vocabulary is None else len(vocabulary.kept_ids)
    offered = {
        "vocab_size": rows,
        "sequence_length": experiment.corpus.sequence_length,
        "teacher": experiment.teacher.model,
        "calibration": calibration,
        "device": str(devices.pick_device(experiment.train.accelerator)),
    }
    student = experiment.student
    options = plugins.arguments(student.class_path, "student", student.options, offered)
    torch.manual_seed(experiment.train.seed)
    model = plugins.build(student.class_path, "student", options, {})
    if vocabulary is not None and model.head.weight_VD.shape[0] >= vocabulary.full_size > rows:
        if not hasattr(model, "keep_tokens"):
            raise UserError(
                f"student {student.class_path}: its head has all of the teacher's tokens, and no method "
                "keep_tokens: build it with the vocab_size that it is given, or use --student.vocabulary full"
            )
        model.keep_tokens(vocabulary.kept_ids)
    return model, options
