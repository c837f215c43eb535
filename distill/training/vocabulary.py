"""A cache of the teacher's tokens for a student that has only some of them: what they are, and batches in its ids.

Shapes: B batch, L sequence length, N positions with loss, K entries of a target (padded), V the teacher's vocabulary.
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
from distill.targets.sparse import SparseTargets, entry_mask


def count_tokens(
    readers: Iterable[CacheReader], vocab_size: int, advance: Callable[[int], None] = lambda tokens: None
) -> NDArray[np.int64]:
    """How often each token occurs `[V]` in the samples of all the readers, padding included.

    Every sample is read once; `advance` is told the number of its tokens.
    """
    counts_V = np.zeros(vocab_size, dtype=np.int64)
    for reader in readers:
        for index in range(len(reader)):
            input_ids_L = reader[index].input_ids_L
            np.add.at(counts_V, input_ids_L, 1)
            advance(len(input_ids_L))
    return counts_V


def trim_batch(batch: Batch, vocabulary: Vocabulary) -> tuple[Batch, Tensor | None]:
    """The batch in the student's ids, and the teacher's mass on dropped tokens, summed over the positions.

    The tokens of the text are all kept (they were counted). Sparse targets lose the entries of dropped tokens:

    * samples (varopt, random): the weights that are left sum to m <= 1, in expectation the mass of the kept tokens.
      With the entropy that goes with them the forward KL is m KL(p | kept ‖ student): unbiased, and 0 at best;
    * targets with a rest (top_k): what is left is scaled to sum to 1, the teacher's distribution given that none of
      the dropped entries comes. A share of the rest may lie on dropped tokens too, which nobody knows, nor counts.

    Hidden states stay, and make that distribution exactly with a head of the kept rows (`trim_head`); the mass is then
    known only where the whole head is computed: None.
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
    """The entries of kept tokens, moved up to where others were, and the weight of those others."""
    width = targets.ids_NK.shape[1]
    ids_NK = vocabulary.mapped(targets.ids_NK)
    is_entry_NK = entry_mask(targets.counts_N, width)
    is_kept_NK = is_entry_NK & (ids_NK >= 0)
    # What is no longer an entry goes to one more place, which is cut off again.
    place_NK = torch.where(is_kept_NK, is_kept_NK.cumsum(1) - 1, width)
    left = SparseTargets(
        _moved(ids_NK, place_NK),
        _moved(targets.weights_NK, place_NK),
        (is_kept_NK & entry_mask(targets.heads_N, width)).sum(1),
        is_kept_NK.sum(1),
        targets.rest_N,
    )
    return left, (targets.weights_NK * (is_entry_NK & ~is_kept_NK)).sum(1)


def _moved(values_NK: Tensor, place_NK: Tensor) -> Tensor:
    rows, width = values_NK.shape
    return values_NK.new_zeros(rows, width + 1).scatter_(1, place_NK, values_NK)[:, :width]


def _scaled(targets: SparseTargets, rest_N: Tensor, kept_tokens: int) -> SparseTargets:
    """Weights and rest that sum to 1. Where each kept token has an entry there is no rest; where none has, only one."""
    rest_N = torch.where(targets.counts_N == kept_tokens, 0, rest_N)
    total_N = targets.weights_NK.sum(1) + rest_N
    is_nothing_N = total_N == 0
    total_N = torch.where(is_nothing_N, 1, total_N)
    rest_N = torch.where(is_nothing_N, 1, rest_N / total_N)
    return replace(targets, weights_NK=targets.weights_NK / total_N[:, None], rest_N=rest_N)


def _entropy_left(batch: Batch, before: SparseTargets, after: SparseTargets) -> Tensor:
    """`m log m - Σ_kept p log p`: what `Σ_kept p (log p - log m)` needs of p, so that the loss is 0 at best.

    Of the heads p is known; the tail's share of the entropy is cut in proportion to its atoms. No gradient depends on
    it. A row that lost nothing has its own entropy back.
    """
    heads_before_N, heads_after_N = _entropy_of_heads(before), _entropy_of_heads(after)
    atoms_before_N, atoms_after_N = before.counts_N - before.heads_N, after.counts_N - after.heads_N
    tail_N = batch.entropy_N - heads_before_N
    share_N = torch.where(atoms_before_N > 0, atoms_after_N / atoms_before_N.clamp(min=1), 1)
    mass_N = after.weights_NK.sum(1)
    left_N = heads_after_N + share_N * tail_N + torch.xlogy(mass_N, mass_N)
    return torch.where(after.counts_N == before.counts_N, batch.entropy_N, left_N)


def _entropy_of_heads(targets: SparseTargets) -> Tensor:
    weights_NK = targets.weights_NK * entry_mask(targets.heads_N, targets.weights_NK.shape[1])
    return -torch.xlogy(weights_NK, weights_NK).sum(1)
