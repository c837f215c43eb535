"""The targets of a chunk of positions, which a divergence takes beside the student's logits.

Shapes: N positions, V vocabulary, K entries of a target, D the teacher's hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.models.language_model import Head


@dataclass(frozen=True)
class SparseChunk:
    """A chunk of sparse targets. Rows are padded with id 0 and weight 0; an entry of weight 0 is no entry."""

    ids_NK: Tensor
    weights_NK: Tensor
    """Weights of the entries. Without a rest they sum to 1, or to less if tokens that the student lacks are out.
    """
    entropy_N: Tensor
    """Entropy of the teacher's whole distribution, in nats."""
    true_ids_N: Tensor
    rest_N: Tensor | None = None
    """Mass of all tokens without an entry, as one bucket. None means that the entries stand for all tokens."""

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
    logits_NV: Tensor | None = None
    """The teacher's logits, in its head's dtype, where they were computed for a whole block."""

    def __getitem__(self, rows: slice) -> DenseChunk:
        logits_NV = None if self.logits_NV is None else self.logits_NV[rows]
        return DenseChunk(self.hidden_ND[rows], self.head, self.true_ids_N[rows], self.temperature, logits_NV)

    @torch.no_grad()
    def with_logits(self) -> DenseChunk:
        """Return the same chunk with its logits. A product for each few rows of it would read the head each time."""
        return replace(self, logits_NV=self.head(self.hidden_ND.to(self.head.weight_VD.dtype)))

    @torch.no_grad()
    def log_probs_NV(self) -> Tensor:
        """Return the teacher's log-probabilities, float32."""
        logits_NV = self.with_logits().logits_NV if self.logits_NV is None else self.logits_NV
        assert logits_NV is not None
        return torch.log_softmax(logits_NV.float() / self.temperature, dim=-1)


ChunkTarget = SparseChunk | DenseChunk

Divergence = Callable[[Tensor, ChunkTarget], Tensor]
"""Function (student logits of a chunk `[C, V]` float32, target of the chunk) -> divergence of each position `[C]`."""
