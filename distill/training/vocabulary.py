"""A cache of the teacher's tokens for a student that has only some of them: token counts, and batches in its ids.

Shapes: B batch, L sequence length, N positions with loss, T entries of all positions, V the teacher's vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.cache.reading.batches import Batch
from distill.cache.reading.reader import CacheReader
from distill.models.vocabulary import Vocabulary
from distill.targets.sparse import SparseTargets


def count_tokens(
    readers: Iterable[CacheReader], vocab_size: int, advance: Callable[[int], None] = lambda tokens: None
) -> NDArray[np.int64]:
    """Count each token `[V]` in the samples of all the readers, padding included.

    Every sample is read once; `advance` receives the number of its tokens.
    """
    counts_V = np.zeros(vocab_size, dtype=np.int64)
    for reader in readers:
        for index in range(len(reader)):
            input_ids_L = reader[index].input_ids_L
            np.add.at(counts_V, input_ids_L, 1)
            advance(len(input_ids_L))
    return counts_V


def trim_batch(batch: Batch, vocabulary: Vocabulary) -> tuple[Batch, Tensor | None]:
    """Return the batch in the student's ids, and the teacher's mass on dropped tokens, summed over the positions.

    The tokens of the text are all kept (they were counted). Sparse targets lose the entries of dropped tokens:

    * samples (varopt, random): the weights that are left sum to m <= 1, in expectation the mass of the kept tokens.
      With the entropy that goes with them the forward KL is m KL(p | kept ‖ student): unbiased, and 0 at best;
    * targets with a rest (top_k): the weights that are left are scaled to sum to 1, the teacher's distribution given
      that none of the dropped entries comes. A share of the rest may lie on dropped tokens too; it is unknown and not
      counted.

    Hidden states stay, and make that distribution exactly with a head of the kept rows (`trim_head`). The mass is then
    known only if the whole head is computed, so it is None.
    """
    input_ids_BL = vocabulary.mapped(batch.input_ids_BL)
    assert bool((input_ids_BL >= 0).all()), "the vocabulary was made of another text"
    if not isinstance(batch.targets, SparseTargets):
        return replace(batch, input_ids_BL=input_ids_BL), None
    targets, dropped_N = _without_dropped(batch.targets, vocabulary)
    if targets.rest_N is not None:
        targets, entropy_N = _scaled(targets, targets.rest_N, len(vocabulary)), batch.entropy_N
    else:
        entropy_N = _entropy_left(batch, batch.targets, targets)
    return replace(batch, input_ids_BL=input_ids_BL, targets=targets, entropy_N=entropy_N), dropped_N.sum()


def _without_dropped(targets: SparseTargets, vocabulary: Vocabulary) -> tuple[SparseTargets, Tensor]:
    """Return the targets without the entries of dropped tokens, and the weight of those entries at each position."""
    ids_T = vocabulary.mapped(targets.ids_T)
    is_kept_T = ids_T >= 0
    left = SparseTargets(
        ids_T[is_kept_T],
        targets.weights_T[is_kept_T],
        _sums(targets, is_kept_T & targets.exact_mask()),
        _sums(targets, is_kept_T),
        targets.rest_N,
    )
    return left, _sums(targets, targets.weights_T * ~is_kept_T)


def _sums(targets: SparseTargets, values_T: Tensor) -> Tensor:
    """Add up a number for each entry, position by position."""
    position_T = torch.arange(len(targets.counts_N)).repeat_interleave(targets.counts_N)
    dtype = values_T.dtype if values_T.is_floating_point() else torch.int64
    return torch.zeros(len(targets.counts_N), dtype=dtype).index_add_(0, position_T, values_T.to(dtype))


def _scaled(targets: SparseTargets, rest_N: Tensor, kept_tokens: int) -> SparseTargets:
    """Scale weights and rest to sum to 1: no rest if every kept token has an entry, nothing else if none has."""
    rest_N = torch.where(targets.counts_N == kept_tokens, 0, rest_N)
    total_N = _sums(targets, targets.weights_T) + rest_N
    is_nothing_N = total_N == 0
    total_N = torch.where(is_nothing_N, 1, total_N)
    rest_N = torch.where(is_nothing_N, 1, rest_N / total_N)
    return replace(targets, weights_T=targets.weights_T / total_N.repeat_interleave(targets.counts_N), rest_N=rest_N)


def _entropy_left(batch: Batch, before: SparseTargets, after: SparseTargets) -> Tensor:
    """Return `m log m - Σ_kept p log p`: what `Σ_kept p (log p - log m)` needs of p, so that the loss is 0 at best.

    Of the exact entries p is known; the tail's share of the entropy is cut in proportion to its atoms. No gradient
    depends on it. A row that lost nothing has its own entropy back.
    """
    exact_before_N, exact_after_N = _entropy_of_exact(before), _entropy_of_exact(after)
    atoms_before_N, atoms_after_N = before.counts_N - before.exact_N, after.counts_N - after.exact_N
    tail_N = batch.entropy_N - exact_before_N
    share_N = torch.where(atoms_before_N > 0, atoms_after_N / atoms_before_N.clamp(min=1), 1)
    mass_N = _sums(after, after.weights_T)
    left_N = exact_after_N + share_N * tail_N + torch.xlogy(mass_N, mass_N)
    return torch.where(after.counts_N == before.counts_N, batch.entropy_N, left_N)


def _entropy_of_exact(targets: SparseTargets) -> Tensor:
    weights_T = targets.weights_T * targets.exact_mask()
    return -_sums(targets, torch.xlogy(weights_T, weights_T))
