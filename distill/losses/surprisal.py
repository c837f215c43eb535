"""Surprisal that a sparse target expects, in closed form and in place: forward KL, cross-entropy, their mixture.

Shapes: N positions, V vocabulary, K entries of a target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.losses.chunks import ChunkTarget, Divergence, SparseChunk
from distill.losses.divergences import cross_entropy, forward_kl
from distill.losses.objective import Mixture


@dataclass(frozen=True)
class Surprisal:
    """The loss `Σ_k w_k (logsumexp(z / T) − z_k / T) − c` of logits z. An id may stand in several places of a row."""

    ids_NK: Tensor
    weights_NK: Tensor
    constant_N: Tensor
    temperature: float = 1.0

    def __getitem__(self, rows: slice) -> Surprisal:
        return Surprisal(self.ids_NK[rows], self.weights_NK[rows], self.constant_N[rows], self.temperature)

    def take_(self, logits_NV: Tensor, needs_grad: bool) -> Tensor:
        """Return the loss of each position, `[N]`, and leave its gradient in the logits' place.

        The gradient is `(m softmax(z / T) − w) / T`, with m the sum of the weights. Without `needs_grad` the logits'
        place holds nothing of use afterwards. Its dtype should be float32 or float64.
        """
        weights_NK = self.weights_NK.to(logits_NV.dtype)
        if self.temperature != 1:
            logits_NV /= self.temperature
        entries_NK = logits_NV.gather(1, self.ids_NK)
        largest_N1 = logits_NV.amax(-1, keepdim=True)
        probs_NV = torch.softmax(logits_NV, -1, out=logits_NV)
        # The largest probability is at least 1 / V, so its logarithm is exact, whatever the others are.
        total_N1 = largest_N1 - probs_NV.amax(-1, keepdim=True).log()
        loss_N = (weights_NK * (total_N1 - entries_NK)).sum(-1) - self.constant_N
        if needs_grad:
            weights_NK = weights_NK / self.temperature
            probs_NV.mul_(weights_NK.sum(-1, keepdim=True)).scatter_add_(1, self.ids_NK, weights_NK.neg())
        return loss_N


def surprisals(divergence: Divergence, target: ChunkTarget) -> list[Surprisal] | None:
    """Return the surprisals whose sum the divergence is, one for each temperature; None if it is of another kind."""
    if divergence is cross_entropy:
        return [_of_text(target, 1.0)]
    mixture = divergence if isinstance(divergence, Mixture) else Mixture(divergence=divergence)
    alpha, temperature = mixture.alpha, mixture.temperature
    if alpha == 1:
        return [_of_text(target, 1.0)]
    if mixture.divergence is not forward_kl or not isinstance(target, SparseChunk) or target.rest_N is not None:
        return None
    share = (1 - alpha) * temperature**2
    of_teacher = Surprisal(target.ids_NK, share * target.weights_NK, share * target.entropy_N, temperature)
    if alpha == 0:
        return [of_teacher]
    of_text = _of_text(target, alpha)
    if temperature != 1:
        return [of_teacher, of_text]
    ids_NK = torch.cat([of_teacher.ids_NK, of_text.ids_NK], dim=1)
    weights_NK = torch.cat([of_teacher.weights_NK, of_text.weights_NK.to(of_teacher.weights_NK.dtype)], dim=1)
    return [Surprisal(ids_NK, weights_NK, of_teacher.constant_N)]


def take_all_(surprisals: list[Surprisal], logits_NV: Tensor, needs_grad: bool) -> Tensor:
    """Return the sum of the losses of each position, `[N]`, and leave its gradient in the logits' place."""
    first, *others = surprisals
    copies = [logits_NV.clone() for _ in others]
    loss_N = first.take_(logits_NV, needs_grad)
    for other, copy_NV in zip(others, copies, strict=True):
        loss_N = loss_N + other.take_(copy_NV, needs_grad)
        if needs_grad:
            logits_NV += copy_NV
    return loss_N


def _of_text(target: ChunkTarget, alpha: float) -> Surprisal:
    true_N = target.true_ids_N
    exact = torch.float32 if true_N.device.type == "mps" else torch.float64  # of which that device has none
    weights_NK = torch.full_like(true_N, alpha, dtype=exact)[:, None]
    return Surprisal(true_N[:, None], weights_NK, torch.zeros_like(true_N, dtype=torch.float32))
