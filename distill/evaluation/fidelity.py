"""The walk over held-out samples: the teacher's hidden states once, then every student against them in chunks.

The teacher and the students are never in memory together: the teacher leaves its hidden states and its head.
Shapes: B batch, L sequence length, N positions with loss, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distill.evaluation.breakdown import Fidelity, Likelihood, Measured, Places
from distill.evaluation.held_out import Sources
from distill.evaluation.metrics import log_probabilities
from distill.models.language_model import Head, LanguageModel
from distill.models.micro_batches import MicroBatches
from distill.models.vocabulary import Vocabulary, trim_head
from distill.targets.next_token import next_ids

Advance = Callable[[int], None]
"""Callback that receives the number of tokens in a finished batch."""

Chunk = tuple[slice, Places]
Each = Callable[[Iterator[Chunk]], Iterator[Chunk]]
"""Hook around the chunks of a batch: a forecast leaves out those that are like the ones before them."""


@dataclass(frozen=True)
class TeacherStates:
    """The teacher's hidden states at positions with loss (on the host, one tensor a batch), and its head."""

    hidden: list[Tensor]
    head: Head


@torch.no_grad()
def teacher_states(
    teacher: LanguageModel, samples: Dataset, batch_size: int, vocab_size: int, device: torch.device, advance: Advance
) -> TeacherStates:
    """Run the teacher's body over the samples, and copy its head to the host."""
    hidden, passes = [], MicroBatches(teacher, batch_size)
    for batch in DataLoader(samples, batch_size=batch_size):
        hidden.append(_hidden(passes, batch, device).cpu())
        advance(batch["input_ids"].numel())
    head = teacher.head.with_rows(vocab_size)
    bias = None if head.bias_V is None else head.bias_V.detach().clone()
    own = replace(head, weight_VD=head.weight_VD.detach().clone(), bias_V=bias)  # a view would keep the teacher alive
    return TeacherStates(hidden, own.to(torch.device("cpu")))


@torch.no_grad()
def dropped_mass(states: TeacherStates, vocabulary: Vocabulary, chunk_size: int, device: torch.device) -> float:
    """Return the teacher's probability of all tokens outside the vocabulary: mean over positions, 0 to 1."""
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
    states: TeacherStates,
    samples: Dataset,
    batch_size: int,
    chunk_size: int,
    device: torch.device,
    *,
    text_bytes: int | None = None,
    documents: Tensor | None = None,
    sources: Sources | None = None,
    each: Each = iter,
) -> Measured:
    """Measure the teacher alone on the samples: likelihood and calibration, by its own entropy and by position.

    The batch size is that of `teacher_states`. For bits per byte, `text_bytes` is the result of the function of that
    name. With `documents`, see `documents_of`, sums are by document, else by sample. Raises UserError if no position
    carries loss.
    """
    names = () if sources is None else sources.names
    metric, head = Likelihood(_clusters(samples, documents), max(len(names), 1)), states.head.to(device)
    for batch, first, hidden_ND in _batches(samples, batch_size, states):
        for rows, places in each(_chunks(batch, first, chunk_size, device, documents, sources)):
            metric.update(head(hidden_ND[rows].to(device)).float(), places)
    return metric.measured(text_bytes, names)


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
    *,
    text_bytes: int | None = None,
    documents: Tensor | None = None,
    sources: Sources | None = None,
    each: Each = iter,
) -> Measured:
    """Measure the student beside the teacher over the full vocabulary, by the teacher's entropy and by position.

    A `vocabulary` is that of a student which has only some of the tokens. Then both distributions are over these
    tokens, and the teacher's (its entropy too) is conditioned on one of them coming. The samples must consist of them
    (`covered`). The batch size is that of `teacher_states`. For bits per byte, `text_bytes` is the result of the
    function of that name. With `documents`, see `documents_of`, sums are by document, else by sample. Raises UserError
    if no position carries loss.
    """
    names = () if sources is None else sources.names
    metric = Fidelity(_clusters(samples, documents), max(len(names), 1))
    teacher_head = (states.head if vocabulary is None else trim_head(states.head, vocabulary)).to(device)
    passes = MicroBatches(student, batch_size)
    head = student.head.with_rows(teacher_head.weight_VD.shape[0])
    for batch, first, teacher_hidden_ND in _batches(samples, batch_size, states):
        if vocabulary is not None:
            batch = {**batch, "input_ids": vocabulary.mapped(batch["input_ids"])}
        hidden_ND = _hidden(passes, batch, device)
        for rows, places in each(_chunks(batch, first, chunk_size, device, documents, sources)):
            teacher_logits_CV = teacher_head(teacher_hidden_ND[rows].to(device)).float()
            metric.update(head(hidden_ND[rows]).float(), teacher_logits_CV, places)
        advance(batch["input_ids"].numel())
    return metric.measured(text_bytes, names)


def _clusters(samples: Dataset, documents: Tensor | None) -> int:
    return len(samples) if documents is None else len(documents)  # type: ignore[arg-type]


def _hidden(passes: MicroBatches, batch: dict[str, Tensor], device: torch.device) -> Tensor:
    hidden_BLD = passes.hidden_states(batch["input_ids"].to(device), batch["position_ids"].to(device))
    return hidden_BLD[batch["loss_mask"].to(device)]


def _batches(
    samples: Dataset, batch_size: int, states: TeacherStates
) -> Iterator[tuple[dict[str, Tensor], int, Tensor]]:
    """Yield each batch, the number of its first sample, and the teacher's hidden states there."""
    first = 0
    for batch, hidden_ND in zip(DataLoader(samples, batch_size=batch_size), states.hidden, strict=True):
        yield batch, first, hidden_ND
        first += len(batch["input_ids"])


def _chunks(
    batch: dict[str, Tensor],
    first: int,
    chunk_size: int,
    device: torch.device,
    documents: Tensor | None,
    sources: Sources | None,
) -> Iterator[Chunk]:
    """Yield slices of a batch's positions with loss, and their places. `first` is the number of the batch's first
    sample.
    """
    mask_BL = batch["loss_mask"]
    next_ids_N = next_ids(batch["input_ids"], mask_BL).to(device)
    if documents is None:
        clusters_N = mask_BL.nonzero()[:, 0] + first
    else:
        clusters_N = torch.searchsorted(documents, batch["document_hash"][mask_BL])
    positions_N = batch["position_ids"][mask_BL]
    sources_N = torch.zeros_like(clusters_N) if sources is None else sources.owners_F[batch["source"][mask_BL]]
    for start in range(0, len(next_ids_N), chunk_size):
        rows = slice(start, start + chunk_size)
        yield rows, Places(next_ids_N[rows], clusters_N[rows], positions_N[rows], sources_N[rows])
