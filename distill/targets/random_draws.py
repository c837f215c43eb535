"""N draws with replacement: unbiased, with more variance than threshold sampling, for comparison.

Source: Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs" (ACL 2025).
Shapes: N positions, V vocabulary, K entries, R draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.targets.sparse import SparseTargets


def random_draws(probs_NV: Tensor, uniform_NR: Tensor) -> SparseTargets:
    """R independent draws from each row; an id's weight is its share of the draws.

    Args:
        probs_NV: distributions, rows summing to 1.
        uniform_NR: R independent numbers in [0, 1) a row, float64.
    """
    cumsum_NV = probs_NV.cumsum(-1, dtype=torch.float64)
    drawn_NR = torch.searchsorted(cumsum_NV, uniform_NR * cumsum_NV[:, -1:], right=True).sort(-1).values
    draws = drawn_NR.shape[1]
    first_NR = torch.ones_like(drawn_NR, dtype=torch.bool)
    first_NR[:, 1:] = drawn_NR[:, 1:] != drawn_NR[:, :-1]
    place_NR = first_NR.cumsum(-1) - 1
    counts_N = first_NR.sum(-1)
    repeats_NR = torch.zeros_like(drawn_NR).scatter_add_(1, place_NR, torch.ones_like(drawn_NR))
    ids_NR = torch.zeros_like(drawn_NR).scatter_(1, place_NR, drawn_NR)
    order_NR = repeats_NR.argsort(dim=-1, descending=True, stable=True)[:, : int(counts_N.max())]
    weights_NK = (repeats_NR.gather(1, order_NR) / draws).to(probs_NV.dtype)
    return SparseTargets(ids_NR.gather(1, order_NR), weights_NK, counts_N, counts_N)
