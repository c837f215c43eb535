"""The one form of sparse targets, from the teacher's distributions to the loss: entries side by side, and counts.

Shapes: N positions, T entries of all positions, K entries of the longest position, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseTargets:
    """Sparse distributions of N positions, of different lengths.

    Position n has `counts_N[n]` entries; they follow those of position n - 1 in `ids_T` and `weights_T`. Its first
    `exact_N[n]` entries are the *exact* ones, with their own probability, by falling weight (the first is the teacher's
    most probable token). The others are *tail atoms* of one common weight, by rising id.
    """

    ids_T: Tensor
    weights_T: Tensor
    exact_N: Tensor
    counts_N: Tensor
    rest_N: Tensor | None = None
    """Mass that no entry carries, as one bucket for all other tokens (`top_k`); None where the weights sum to 1."""

    @classmethod
    def of_rows(
        cls, ids_NK: Tensor, weights_NK: Tensor, exact_N: Tensor, counts_N: Tensor, rest_N: Tensor | None = None
    ) -> SparseTargets:
        """Make targets of padded rows; whatever lies behind a row's last entry is dropped."""
        is_entry_NK = entry_mask(counts_N, ids_NK.shape[1])
        return cls(ids_NK[is_entry_NK], weights_NK[is_entry_NK], exact_N, counts_N, rest_N)

    @classmethod
    def cat(cls, parts: Sequence[SparseTargets]) -> SparseTargets:
        """Join targets, position after position; all of them have a rest, or none."""
        rests = [part.rest_N for part in parts if part.rest_N is not None]
        return cls(
            torch.cat([part.ids_T for part in parts]),
            torch.cat([part.weights_T for part in parts]),
            torch.cat([part.exact_N for part in parts]),
            torch.cat([part.counts_N for part in parts]),
            torch.cat(rests) if rests else None,
        )

    def padded(self) -> tuple[Tensor, Tensor]:
        """Return ids and weights as rows `[N, K]`. Behind a row's last entry both are 0."""
        width = int(self.counts_N.max()) if len(self.counts_N) else 0
        # A gather: on a GPU, assigning through a mask would wait for the mask's values.
        start_N1 = (self.counts_N.cumsum(0) - self.counts_N)[:, None]
        place_NK = start_N1 + torch.arange(width, device=start_N1.device)
        place_NK = place_NK.clamp(max=max(len(self.ids_T) - 1, 0))
        is_entry_NK = entry_mask(self.counts_N, width)
        return self.ids_T[place_NK] * is_entry_NK, self.weights_T[place_NK] * is_entry_NK

    def __getitem__(self, rows: slice) -> SparseTargets:
        """Return the targets of some positions; `rows` has a step of 1."""
        first, last, _ = rows.indices(len(self.counts_N))
        begin = int(self.counts_N[:first].sum())
        entries = slice(begin, begin + int(self.counts_N[first:last].sum()))
        rest_N = None if self.rest_N is None else self.rest_N[rows]
        return SparseTargets(
            self.ids_T[entries], self.weights_T[entries], self.exact_N[rows], self.counts_N[rows], rest_N
        )

    def cpu(self) -> SparseTargets:
        """Return the targets on the CPU."""
        rest_N = None if self.rest_N is None else self.rest_N.cpu()
        return SparseTargets(self.ids_T.cpu(), self.weights_T.cpu(), self.exact_N.cpu(), self.counts_N.cpu(), rest_N)

    def exact_mask(self) -> Tensor:
        """Return `[T]`: True for exact entries, False for tail atoms."""
        first_T = (self.counts_N.cumsum(0) - self.counts_N).repeat_interleave(self.counts_N)
        place_T = torch.arange(len(self.ids_T), device=first_T.device) - first_T
        return place_T < self.exact_N.repeat_interleave(self.counts_N)

    def dense(self, vocab_size: int) -> Tensor:
        """Return the same targets as `[N, V]` weights (for tests and figures, never for training)."""
        ids_NK, weights_NK = self.padded()
        return weights_NK.new_zeros(len(ids_NK), vocab_size).scatter_add_(1, ids_NK, weights_NK)


def entry_mask(counts_N: Tensor, width: int) -> Tensor:
    """Return a boolean `[N, width]`: True on the first `counts_N[n]` places of row n."""
    return torch.arange(width, device=counts_N.device) < counts_N[:, None]
