"""The k largest and a bucket for the rest: exact where k is the vocabulary, falling, whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.losses.chunks import SparseChunk
from distill.losses.divergences import forward_kl
from distill.targets.top_k import top_k


def test_all_of_the_vocabulary_is_exact(random_rows: Tensor) -> None:
    """KL(p, p) = 0 and its gradient too."""
    probs_NV = random_rows.double()
    probs_NV = probs_NV / probs_NV.sum(-1, keepdim=True)
    targets = top_k(probs_NV, probs_NV.shape[1])
    torch.testing.assert_close(targets.dense(1009), probs_NV, atol=1e-15, rtol=0)
    logits_NV = (probs_NV.log() + 3).requires_grad_()
    target = SparseChunk(
        *targets.padded(),
        torch.special.entr(probs_NV).sum(-1),
        torch.zeros(len(probs_NV), dtype=torch.long),
        targets.rest_N,
    )
    kl_N = forward_kl(logits_NV, target)
    assert kl_N.abs().max() < 1e-12
    (grad_NV,) = torch.autograd.grad(kl_N.sum(), logits_NV)
    assert grad_NV.abs().max() < 1e-12


@pytest.mark.parametrize("k", [1, 17, 1009, 5000])
def test_form(random_rows: Tensor, k: int) -> None:
    targets = top_k(random_rows, k)
    expected_NK = random_rows.sort(descending=True).values
    ids_NK, weights_NK = targets.padded()
    torch.testing.assert_close(weights_NK, expected_NK[:, :k])
    assert torch.equal(random_rows.gather(1, ids_NK), weights_NK)
    assert set(targets.counts_N.tolist()) == set(targets.exact_N.tolist()) == {min(k, 1009)}
    assert targets.rest_N is not None
    torch.testing.assert_close(targets.rest_N, expected_NK[:, k:].sum(-1), atol=1e-6, rtol=0)
    assert (targets.rest_N >= 0).all()
