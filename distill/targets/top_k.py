"""The k largest probabilities and one bucket for the rest: biased (the tail has no shape), for comparison.

Shapes: N positions, V vocabulary, K entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.targets.sparse import SparseTargets


def top_k(probs_NV: Tensor, k: int) -> SparseTargets:
    """Keep the `k` largest entries of each row as they are; `rest_N` is the mass of all others together.

    With `k = V` the target is exact and the rest is 0.
    """
    weights_NK, ids_NK = probs_NV.topk(min(k, probs_NV.shape[1]), dim=-1)
    counts_N = torch.full((len(ids_NK),), ids_NK.shape[1], device=ids_NK.device)
    rest_N = (1 - weights_NK.sum(-1, dtype=torch.float64)).clamp(min=0).to(probs_NV.dtype)
    if ids_NK.shape[1] == probs_NV.shape[1]:
        rest_N = torch.zeros_like(rest_N)
    return SparseTargets.of_rows(ids_NK, weights_NK, counts_N, counts_N, rest_N)
