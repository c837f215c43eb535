"""Draws with replacement: unbiased, with more variance than threshold sampling, for comparison.

Source: Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs" (ACL 2025).
Shapes: N positions, V vocabulary, K entries, R draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.targets.sparse import SparseTargets


def random_draws(probs_NV: Tensor, uniform_NR: Tensor, exponent: float = 1.0) -> SparseTargets:
    """R independent draws from `q ~ p^exponent` of each row; weights are proportional to `draws * p / q`.

    With exponent 1 an id's weight is its share of the draws, and the target is unbiased. Other exponents are importance
    weighted and normalised to sum to 1, which is consistent but, for few draws, not unbiased.

    Args:
        probs_NV: distributions, rows summing to 1.
        uniform_NR: R independent numbers in [0, 1) a row, float64.
    """
    proposal_NV = probs_NV if exponent == 1 else probs_NV.double().pow(exponent)
    cumsum_NV = proposal_NV.cumsum(-1, dtype=torch.float64)
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
    weights_NR = repeats_NR.double()
    if exponent != 1:
        weights_NR = weights_NR * probs_NV.gather(1, ids_NR).double().pow(1 - exponent) * (repeats_NR > 0)
    # Rounded before they are put in order, so that equals are equals whatever the last bit of their powers.
    weights_NR = (weights_NR / weights_NR.sum(-1, keepdim=True)).to(probs_NV.dtype)
    order_NK = weights_NR.argsort(dim=-1, descending=True, stable=True)[:, : int(counts_N.max())]
    return SparseTargets(ids_NR.gather(1, order_NK), weights_NR.gather(1, order_NK), counts_N, counts_N)
