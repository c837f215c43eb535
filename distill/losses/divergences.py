"""Divergences between the teacher and the student, as pure functions of a chunk of positions.

Shapes: N positions, V vocabulary, K entries of a target, D the teacher's hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.models.language_model import Head


@dataclass(frozen=True)
class SparseChunk:
    """A chunk of sparse targets."""

    ids_NK: Tensor
    weights_NK: Tensor
    entropy_N: Tensor
    """Entropy of the teacher's whole distribution, in nats."""
    true_ids_N: Tensor
    rest_N: Tensor | None = None
    """Mass of all tokens without an entry, as one bucket; None: the weights sum to 1."""

    def __getitem__(self, rows: slice) -> SparseChunk:
        rest_N = None if self.rest_N is None else self.rest_N[rows]
        return SparseChunk(
            self.ids_NK[rows], self.weights_NK[rows], self.entropy_N[rows], self.true_ids_N[rows], rest_N
        )


@dataclass(frozen=True)
class DenseChunk:
    """A chunk of exact targets: the teacher's hidden states, and the head that makes logits of them."""

    hidden_ND: Tensor
    head: Head
    true_ids_N: Tensor
    temperature: float = 1.0

    def __getitem__(self, rows: slice) -> DenseChunk:
        return DenseChunk(self.hidden_ND[rows], self.head, self.true_ids_N[rows], self.temperature)

    @torch.no_grad()
    def log_probs_NV(self) -> Tensor:
        """The teacher's log-probabilities, float32."""
        logits_NV = self.head(self.hidden_ND.to(self.head.weight_VD.dtype)).float()
        return torch.log_softmax(logits_NV / self.temperature, dim=-1)


ChunkTarget = SparseChunk | DenseChunk


def forward_kl(logits_NV: Tensor, target: ChunkTarget) -> Tensor:
    """`[N]` KL(teacher || student) in nats: `logsumexp(z) - sum_k w_k z_k - H(teacher)`.

    Equals `(p * (p.log() - z.log_softmax(-1))).sum(-1)` when the target holds all of p, and its expectation over
    targets equals that for an unbiased scheme. Its gradient in z is `softmax(z) - w`. Source: Hinton et al. 2015.
    A single position can read below 0 where the target is a sample. With a rest, the tokens without an entry count as
    one outcome on both sides.
    """
    if isinstance(target, DenseChunk):
        teacher_NV = target.log_probs_NV().to(logits_NV.dtype)
        return (teacher_NV.exp() * (teacher_NV - torch.log_softmax(logits_NV, dim=-1))).sum(-1)
    if target.rest_N is not None:
        return _bucketed_kl(logits_NV, target, target.rest_N)
    expected_N = (target.weights_NK * logits_NV.gather(1, target.ids_NK)).sum(-1)
    return torch.logsumexp(logits_NV, dim=-1) - expected_N - target.entropy_N


def _bucketed_kl(logits_NV: Tensor, target: SparseChunk, rest_N: Tensor) -> Tensor:
    """KL over K + 1 outcomes: `sum_k w_k log(w_k / q_k) + r log(r / (1 - sum_k q_k))`."""
    total_N = torch.logsumexp(logits_NV, dim=-1)
    log_q_NK = logits_NV.gather(1, target.ids_NK) - total_N[:, None]
    kl_N = (torch.xlogy(target.weights_NK, target.weights_NK) - target.weights_NK * log_q_NK).sum(-1)
    if target.ids_NK.shape[1] == logits_NV.shape[1]:
        return kl_N  # the bucket is empty
    # Summed over the bucket's own tokens: 1 - sum_k q_k loses all its digits where the student is sure.
    log_left_N = logits_NV.scatter(1, target.ids_NK, -torch.inf).logsumexp(dim=-1) - total_N
    return kl_N + torch.xlogy(rest_N, rest_N) - rest_N * log_left_N


def cross_entropy(logits_NV: Tensor, target: ChunkTarget) -> Tensor:
    """`[N]` negative log-probability of the true next token in nats."""
    return torch.nn.functional.cross_entropy(logits_NV, target.true_ids_N, reduction="none")


@dataclass(frozen=True)
class Mixture:
    """`(1 - alpha) * T^2 * KL(teacher || student) + alpha * cross-entropy`: 0 the teacher alone, 1 the text alone.

    T is the temperature of the teacher's distribution; the student's is softened likewise, and T^2 keeps the size of
    the gradient (Hinton et al. 2015).
    """

    alpha: float = 0.0
    temperature: float = 1.0

    def __call__(self, logits_NV: Tensor, target: ChunkTarget) -> Tensor:
        if self.alpha == 1:
            return cross_entropy(logits_NV, target)
        distilled_N = self.temperature**2 * forward_kl(logits_NV / self.temperature, target)
        if self.alpha == 0:
            return distilled_N
        return (1 - self.alpha) * distilled_N + self.alpha * cross_entropy(logits_NV, target)
