"""Divergences between a sparse target and the student, as pure functions of a chunk of positions.

Shapes: N positions, V vocabulary, K entries of a target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkTarget:
    """What a divergence may know about a chunk of positions."""

    ids_NK: Tensor
    weights_NK: Tensor
    entropy_N: Tensor
    true_ids_N: Tensor

    def __getitem__(self, rows: slice) -> ChunkTarget:
        return ChunkTarget(self.ids_NK[rows], self.weights_NK[rows], self.entropy_N[rows], self.true_ids_N[rows])


def forward_kl(logits_NV: Tensor, target: ChunkTarget) -> Tensor:
    """`[N]` KL(teacher || student) in nats: `logsumexp(z) - sum_k w_k z_k - H(teacher)`.

    Equals `(p * (p.log() - z.log_softmax(-1))).sum(-1)` when the target holds all of p, and its expectation over
    targets equals that for an unbiased scheme. Its gradient in z is `softmax(z) - w`. Source: Hinton et al. 2015.
    A single position can read below 0 where the target is a sample.
    """
    expected_N = (target.weights_NK * logits_NV.gather(1, target.ids_NK)).sum(-1)
    return torch.logsumexp(logits_NV, dim=-1) - expected_N - target.entropy_N


def cross_entropy(logits_NV: Tensor, target: ChunkTarget) -> Tensor:
    """`[N]` negative log-probability of the true next token in nats."""
    return torch.nn.functional.cross_entropy(logits_NV, target.true_ids_N, reduction="none")


@dataclass(frozen=True)
class Mixture:
    """`(1 - alpha) * forward_kl + alpha * cross_entropy`: 0 learns from the teacher alone, 1 from the text alone."""

    alpha: float = 0.0

    def __call__(self, logits_NV: Tensor, target: ChunkTarget) -> Tensor:
        if self.alpha == 0:
            return forward_kl(logits_NV, target)
        if self.alpha == 1:
            return cross_entropy(logits_NV, target)
        return (1 - self.alpha) * forward_kl(logits_NV, target) + self.alpha * cross_entropy(logits_NV, target)
