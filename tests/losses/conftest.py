"""Targets of a batch of positions, as the losses take them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from distill.losses.chunks import SparseChunk


@pytest.fixture(scope="session")
def make_target() -> Callable[..., SparseChunk]:
    """`make_target(positions, vocab_size)`: random sparse targets of 1 to 16 entries, padded with id 0, weight 0."""

    def make(positions: int, vocab_size: int, dtype: torch.dtype = torch.float64) -> SparseChunk:
        generator = torch.Generator().manual_seed(7)
        ids_NK = torch.rand(positions, vocab_size, generator=generator).argsort(-1)[:, :16]
        weights_NK = torch.rand(positions, 16, generator=generator, dtype=torch.float64) + 0.01
        count_N = torch.randint(1, 17, (positions,), generator=generator)
        entry_NK = torch.arange(16) < count_N[:, None]
        weights_NK = weights_NK * entry_NK
        return SparseChunk(
            ids_NK=ids_NK * entry_NK,
            weights_NK=(weights_NK / weights_NK.sum(-1, keepdim=True)).to(dtype),
            entropy_N=torch.rand(positions, generator=generator, dtype=torch.float64).to(dtype),
            true_ids_N=torch.randint(vocab_size, (positions,), generator=generator),
        )

    return make
