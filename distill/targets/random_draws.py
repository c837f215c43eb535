"""Draws with replacement: unbiased, with more variance than threshold sampling, for comparison.

Source: Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs" (ACL 2025).
Shapes: N positions, V vocabulary, K entries, R draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.targets.sparse import SparseTargets


def random_draws(probs_NV: Tensor, uniform_NR: Tensor) -> SparseTargets:
    """Draw R ids of each row with replacement; an id's weight is its share of the draws. Unbiased.

    Args:
        probs_NV: distributions, rows summing to 1.
        uniform_NR: R independent numbers in [0, 1) a row, float64.
    """
    cumsum_NV = probs_NV.cumsum(-1, dtype=torch.float64)
    # The last number may round up to the end, behind which there are only tokens without probability.
    end_N1 = cumsum_NV[:, -1:]
    points_NR = torch.minimum(uniform_NR * end_N1, end_N1.nextafter(end_N1.new_zeros(())))
    drawn_NR = torch.searchsorted(cumsum_NV, points_NR, right=True).sort(-1).values
    first_NR = torch.ones_like(drawn_NR, dtype=torch.bool)
    first_NR[:, 1:] = drawn_NR[:, 1:] != drawn_NR[:, :-1]
    place_NR = first_NR.cumsum(-1) - 1
    counts_N = first_NR.sum(-1)
    repeats_NR = torch.zeros_like(drawn_NR).scatter_add_(1, place_NR, torch.ones_like(drawn_NR))
    ids_NR = torch.zeros_like(drawn_NR).scatter_(1, place_NR, drawn_NR)
    order_NK = repeats_NR.argsort(dim=-1, descending=True, stable=True)[:, : int(counts_N.max())]
    weights_NK = (repeats_NR.gather(1, order_NK).double() / drawn_NR.shape[1]).to(probs_NV.dtype)
    return SparseTargets.of_rows(ids_NR.gather(1, order_NK), weights_NK, counts_N, counts_N)
