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
from torch.utils.data import DataLoader, Dataset, Subset

from distill.evaluation.metrics import Fidelity, Likelihood, log_probabilities
from distill.models.language_model import Head, LanguageModel
from distill.models.vocabulary import Vocabulary, trim_head

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
def dropped_mass(states: TeacherStates, vocabulary: Vocabulary, chunk_size: int, device: torch.device) -> float:
    """The teacher's probability of all the tokens that are not in the vocabulary: mean over positions, 0 to 1."""
    head = states.head.to(device)
    is_dropped_V = (vocabulary.to_student < 0).to(device)
    total, positions = 0.0, 0
    for hidden_ND in states.hidden:
        for hidden_CD in hidden_ND.split(chunk_size):
            logp_CV = log_probabilities(head(hidden_CD.to(device)).float())
            total += float(logp_CV.exp()[:, is_dropped_V].sum(dtype=torch.float64))
            positions += len(hidden_CD)
    return total / positions if positions else 0.0


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
    vocabulary: Vocabulary | None = None,
) -> dict[str, Any]:
    """nll, KL(teacher || student), top-1 agreement and acceptance rate over the full vocabulary.

    With the `vocabulary` of a student that has only some of the tokens: over these, where the teacher's distribution
    is the one given that one of them comes. The samples must be made of them (`covered`).
    """
    metric = Fidelity()
    teacher_head = (states.head if vocabulary is None else trim_head(states.head, vocabulary)).to(device)
    head = student.head.with_rows(teacher_head.weight_VD.shape[0])
    for batch, teacher_hidden_ND in zip(DataLoader(samples, batch_size=batch_size), states.hidden, strict=True):
        if vocabulary is not None:
            batch = {**batch, "input_ids": vocabulary.mapped(batch["input_ids"])}
        hidden_ND = _hidden(student, batch, device)
        for rows, next_ids_C in _chunks(batch, chunk_size, device):
            teacher_logits_CV = teacher_head(teacher_hidden_ND[rows].to(device)).float()
            metric.update(head(hidden_ND[rows]).float(), teacher_logits_CV, next_ids_C)
        advance(batch["input_ids"].numel())
    return metric.compute()


def covered(samples: Subset, vocabulary: Vocabulary) -> Subset:
    """The samples that are made of the vocabulary's tokens alone."""
    fine = [index for index in range(len(samples)) if vocabulary.covers(samples[index]["input_ids"])]
    return Subset(samples, fine)


def _hidden(model: LanguageModel, batch: dict[str, Tensor], device: torch.device) -> Tensor:
    hidden_BLD = model.body(batch["input_ids"].to(device), batch["position_ids"].to(device))
    return hidden_BLD[batch["loss_mask"].to(device)]


def _chunks(batch: dict[str, Tensor], chunk_size: int, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Slices of a batch's positions with loss, and the true next tokens there."""
    next_ids_N = batch["input_ids"].roll(-1, dims=-1)[batch["loss_mask"]].to(device)
    for start in range(0, len(next_ids_N), chunk_size):
        rows = slice(start, start + chunk_size)
        yield rows, next_ids_N[rows]
