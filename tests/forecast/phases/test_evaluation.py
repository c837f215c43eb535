"""The evaluation, simulated: its models, the teacher's head and the chunks' logits are counted."""

from __future__ import annotations

from typing import Any

import torch

from distill.forecast.phases.evaluation import simulate_fidelity, simulate_likelihood
from students.compact import CompactDecoder

TEXT: dict[str, Any] = {"batch_size": 2, "length": 64, "vocab_size": 1000, "documents": 2}


def student() -> CompactDecoder:
    return CompactDecoder(1000, 64, 2, 4)


def test_the_student_lies_beside_the_teachers_head() -> None:
    found = simulate_fidelity(student, teacher_hidden_size=96, teacher_dtype=torch.bfloat16, chunk_size=32, **TEXT)
    weights = sum(parameter.nbytes for parameter in student().parameters())
    assert weights + 2 * 96 * 1000 <= found.parts["weights"] <= 1.01 * (weights + 2 * 96 * 1000) + 4096
    wider = simulate_fidelity(student, teacher_hidden_size=96, teacher_dtype=torch.bfloat16, chunk_size=128, **TEXT)
    assert wider.peak_bytes > found.peak_bytes + 3 * (128 - 32) * 1000 * 4
    assert found.flops > 0


def test_the_teacher_reads_with_a_copy_of_its_head() -> None:
    found = simulate_likelihood(student, chunk_size=32, **TEXT)
    weights = sum(parameter.nbytes for parameter in student().parameters())
    assert found.parts["weights"] >= weights + 4 * 64 * 1000
