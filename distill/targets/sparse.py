"""A batch of targets: for each position a few token ids and weights that stand for the teacher's distribution.

Shapes: N positions, K entries of a target (padded to the largest), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseTargets:
    """Sparse distributions of N positions. Padding entries have id 0 and weight 0.

    The first `heads_N` entries of a row are *heads* in order of falling weight (the first is the teacher's most
    probable token); the others, up to `counts_N`, are *tail atoms* of one common weight in order of rising id.
    """

    ids_NK: Tensor
    weights_NK: Tensor
    heads_N: Tensor
    counts_N: Tensor
    rest_N: Tensor | None = None
    """Mass that no entry carries, as one bucket for all other tokens (`top_k`); None where there is none."""

    def dense(self, vocab_size: int) -> Tensor:
        """The same targets as `[N, V]` weights (for tests and figures, never for training)."""
        weights_NV = self.weights_NK.new_zeros(self.ids_NK.shape[0], vocab_size)
        return weights_NV.scatter_add_(1, self.ids_NK, self.weights_NK)


def entry_mask(counts_N: Tensor, width: int) -> Tensor:
    """Boolean `[N, width]`: True on the first `counts_N[n]` places of row n."""
    return torch.arange(width, device=counts_N.device) < counts_N[:, None]
