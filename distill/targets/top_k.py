"""The k largest probabilities, renormalised: biased (the tail is lost), for comparison.

Shapes: N positions, V vocabulary, K entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.targets.sparse import SparseTargets


def top_k(probs_NV: Tensor, k: int) -> SparseTargets:
    """The `k` largest entries of each row, scaled to sum to 1. With `k = V` the target is exact."""
    weights_NK, ids_NK = probs_NV.topk(min(k, probs_NV.shape[1]), dim=-1)
    counts_N = torch.full((len(ids_NK),), ids_NK.shape[1], device=ids_NK.device)
    return SparseTargets(ids_NK, weights_NK / weights_NK.sum(-1, keepdim=True), counts_N, counts_N)
