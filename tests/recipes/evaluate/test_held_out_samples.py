"""The evaluation's samples are spread over all held-out documents, and whole documents are resampled where enough."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill.corpus.packing import STREAM
from distill.evaluation.statistics import MINIMUM_DOCUMENTS
from distill.recipes.evaluate.to_teacher import FidelityToTeacher

LENGTH, EACH = 8, 6


def held_out(documents: int) -> list[dict[str, torch.Tensor]]:
    """Samples of documents that fill six each."""
    mask_L = torch.ones(LENGTH, dtype=torch.bool)
    hashes = [document * 11 - 40 for document in range(documents) for _ in range(EACH)]
    return [{"loss_mask": mask_L, "document_hash": torch.full((LENGTH,), each)} for each in hashes]


def measurement(documents: int, max_samples: int | None) -> FidelityToTeacher:
    experiment: Any = SimpleNamespace(
        evaluate=SimpleNamespace(max_samples=max_samples), corpus=SimpleNamespace(sequence_length=LENGTH)
    )
    samples: Any = SimpleNamespace(
        held_out=held_out(documents), fingerprint="", rendering={}, packing=STREAM, counts=()
    )
    teacher: Any = None
    return FidelityToTeacher(experiment, teacher, samples, None, 1)


@pytest.mark.parametrize("documents", [2, 5, 16])
def test_a_few_samples_come_from_all_documents(documents: int) -> None:
    few = measurement(documents, 2 * documents)
    assert len(few.samples) == 2 * documents and len(few.documents) == documents
    assert len(measurement(documents, None).samples) == len(measurement(documents, 10_000).samples) == EACH * documents


def test_documents_are_resampled_where_there_are_enough() -> None:
    assert measurement(MINIMUM_DOCUMENTS - 1, None).resampled is None
    resampled = measurement(MINIMUM_DOCUMENTS, None).resampled
    assert resampled is not None and len(resampled) == MINIMUM_DOCUMENTS
