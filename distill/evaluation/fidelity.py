"""The walk over held-out samples: the teacher's hidden states once, then every student against them in chunks.

The teacher and the students are never in memory together: the teacher leaves its hidden states and its head.
Shapes: B batch, L sequence length, N positions with loss, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distill.evaluation.metrics import Fidelity, Likelihood
from distill.models.language_model import Head, LanguageModel

Advance = Callable[[int], None]
"""Told the number of tokens that a batch had."""


@dataclass(frozen=True)
class TeacherStates:
    """What is kept of the teacher: hidden states at positions with loss (on the host, one tensor a batch), its head."""

    hidden: list[Tensor]
    head: Head


@torch.no_grad()
def teacher_states(
    teacher: LanguageModel, samples: Dataset, batch_size: int, vocab_size: int, device: torch.device, advance: Advance
) -> TeacherStates:
    """Run the teacher's body over the samples; its head is copied to the host."""
    hidden = []
    for batch in DataLoader(samples, batch_size=batch_size):
        hidden.append(_hidden(teacher, batch, device).cpu())
        advance(batch["input_ids"].numel())
    head = teacher.head.with_rows(vocab_size)
    bias = None if head.bias_V is None else head.bias_V.detach().clone()
    own = replace(head, weight_VD=head.weight_VD.detach().clone(), bias_V=bias)  # not a view that keeps the teacher
    return TeacherStates(hidden, own.to(torch.device("cpu")))


@torch.no_grad()
def teacher_likelihood(
    states: TeacherStates, samples: Dataset, batch_size: int, chunk_size: int, device: torch.device
) -> dict[str, Any]:
    """The teacher's own nll and perplexity on the samples."""
    metric, head = Likelihood(), states.head.to(device)
    for batch, hidden_ND in zip(DataLoader(samples, batch_size=batch_size), states.hidden, strict=True):
        for rows, next_ids_C in _chunks(batch, chunk_size, device):
            metric.update(head(hidden_ND[rows].to(device)).float(), next_ids_C)
    return metric.compute()


@torch.no_grad()
def student_fidelity(
    student: LanguageModel,
    states: TeacherStates,
    samples: Dataset,
    batch_size: int,
    chunk_size: int,
    device: torch.device,
    advance: Advance,
) -> dict[str, Any]:
    """nll, KL(teacher || student), top-1 agreement and acceptance rate over the full vocabulary."""
    metric, teacher_head = Fidelity(), states.head.to(device)
    head = student.head.with_rows(teacher_head.weight_VD.shape[0])
    for batch, teacher_hidden_ND in zip(DataLoader(samples, batch_size=batch_size), states.hidden, strict=True):
        hidden_ND = _hidden(student, batch, device)
        for rows, next_ids_C in _chunks(batch, chunk_size, device):
            teacher_logits_CV = teacher_head(teacher_hidden_ND[rows].to(device)).float()
            metric.update(head(hidden_ND[rows]).float(), teacher_logits_CV, next_ids_C)
        advance(batch["input_ids"].numel())
    return metric.compute()


def _hidden(model: LanguageModel, batch: dict[str, Tensor], device: torch.device) -> Tensor:
    hidden_BLD = model.body(batch["input_ids"].to(device), batch["position_ids"].to(device))
    return hidden_BLD[batch["loss_mask"].to(device)]


def _chunks(batch: dict[str, Tensor], chunk_size: int, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Slices of a batch's positions with loss, and the true next tokens there."""
    next_ids_N = batch["input_ids"].roll(-1, dims=-1)[batch["loss_mask"]].to(device)
    for start in range(0, len(next_ids_N), chunk_size):
        rows = slice(start, start + chunk_size)
        yield rows, next_ids_N[rows]
