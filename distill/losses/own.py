"""Divergences of the user's own, named in the experiment file as `module:function`: tried early, on a few positions.

Shapes: N positions, V vocabulary, K entries of a target, D the teacher's hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distill import plugins
from distill.errors import UserError
from distill.losses.chunks import ChunkTarget, DenseChunk, Divergence, SparseChunk
from distill.models.language_model import Head
from distill.system.blame import blame, failed
from distill.system.memory import is_out_of_memory

_N, _V, _K, _D = 6, 23, 4, 8


@dataclass(frozen=True)
class OwnDivergence:
    """Function of the user's: student logits of a chunk `[N, V]` and its target → divergence of each position `[N]`."""

    name: str
    function: Divergence = field(compare=False)

    def __call__(self, logits_NV: Tensor, target: ChunkTarget) -> Tensor:
        """Return the divergences. Raises UserError with the user's line where the function fails."""
        try:
            return self.function(logits_NV, target)
        except BaseException as error:
            if not failed(error) or is_out_of_memory(error) or isinstance(error, UserError):
                raise
            raise UserError(f"loss.divergence: {self.name}: {blame(error, self.function)}") from error


def is_own(name: str) -> bool:
    """Tell whether the name of a divergence is that of a user's function."""
    return ":" in name


def load_divergence(name: str) -> OwnDivergence:
    """Return the function that a name means. Raises UserError if there is none."""
    return OwnDivergence(name, plugins.load(name, "divergence"))


def try_divergence(divergence: OwnDivergence, scheme: str) -> None:
    """Raise UserError unless the function is one of a chunk of the scheme's targets.

    Its answer has a finite number for each position, which depends on that position alone (a chunk is walked a few rows
    at a time) and has a finite gradient in the logits.
    """
    target, logits_NV = _target(scheme), torch.randn(_N, _V, generator=torch.Generator().manual_seed(1))
    where = f"loss.divergence: {divergence.name}"
    logits_NV.requires_grad_()
    given_NV = logits_NV.detach().clone()
    with torch.enable_grad():
        found: Any = divergence(logits_NV, target)
        if not isinstance(found, Tensor) or found.shape != (_N,):
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UserError(f"{where}: returns {shape} of {_N} positions: return a tensor [{_N}], and no mean or sum")
        if not found.is_floating_point() or not found.isfinite().all():
            raise UserError(f"{where}: returns numbers that are not finite, of finite logits")
        if not found.requires_grad:
            raise UserError(
                f"{where}: has no gradient in the student's logits: compute it of the logits, with autograd"
            )
        (slope_NV,) = torch.autograd.grad(found.sum(), logits_NV, allow_unused=True)
    if slope_NV is None or not slope_NV.isfinite().all():
        raise UserError(f"{where}: its gradient in the student's logits is missing or not finite")
    if not torch.equal(logits_NV.detach(), given_NV):
        raise UserError(f"{where}: writes over the logits that it is given: leave them as they are")
    rows = slice(2, 4)
    alone = divergence(logits_NV.detach()[rows], target[rows])
    if alone.shape != (2,) or not torch.allclose(alone, found.detach()[rows], rtol=1e-4, atol=1e-5):
        raise UserError(
            f"{where}: a position's number depends on the other positions of its chunk: chunks are walked a few rows "
            "at a time, so each row must be by itself"
        )


def _target(scheme: str) -> ChunkTarget:
    """Return targets of random distributions, in the form that a cache of the scheme gives."""
    generator = torch.Generator().manual_seed(0)
    true_ids_N = torch.arange(_N) % _V
    if scheme == "hidden":
        hidden_ND, weight_VD = torch.randn(_N, _D, generator=generator), torch.randn(_V, _D, generator=generator)
        return DenseChunk(hidden_ND, Head(weight_VD), true_ids_N).with_logits()
    probs_NV = torch.randn(_N, _V, generator=generator).softmax(-1)
    weights_NK, ids_NK = probs_NV.topk(_K)
    entropy_N = -(probs_NV * probs_NV.log()).sum(-1)
    if scheme == "top_k":
        return SparseChunk(ids_NK, weights_NK, entropy_N, true_ids_N, 1 - weights_NK.sum(-1))
    return SparseChunk(ids_NK, weights_NK / weights_NK.sum(-1, keepdim=True), entropy_N, true_ids_N)
