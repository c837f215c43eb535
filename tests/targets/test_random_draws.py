"""Draws with replacement: whole shares of the draws, unbiased, inside the vocabulary."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distill.targets.random_draws import random_draws


def uniforms(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_mean_over_many_draws(random_rows: Tensor) -> None:
    """Hits of an id in 200 rows of 50 draws are a binomial number."""
    for row in (1, 5, 8):
        probs_V = random_rows[row].double()
        dense_NV = random_draws(probs_V.repeat(200, 1), uniforms(200, 50, seed=row)).dense(1009)
        draws = 200 * 50
        variance_V = draws * probs_V * (1 - probs_V)
        seen = variance_V >= 25
        z = (dense_NV.sum(0) * 50 - draws * probs_V)[seen] / variance_V[seen].sqrt()
        assert len(z) > 10 and z.abs().max() <= 4
        rare = ~seen
        expected = draws * probs_V[rare].sum()
        assert abs(dense_NV.sum(0)[rare].sum() * 50 - expected) <= 4 * expected.sqrt()


def test_form(random_rows: Tensor) -> None:
    targets = random_draws(random_rows, uniforms(12, 50))
    for n, count in enumerate(targets.counts_N.tolist()):
        ids, weights = targets[n : n + 1].ids_T, targets[n : n + 1].weights_T
        assert len(ids) == len(weights) == count
        assert ids.unique().numel() == count
        shares = weights.double() * 50
        assert (shares.round() - shares).abs().max() < 1e-5 and shares.min() > 0.99
        assert shares.round().sum() == 50
        assert (weights.diff() <= 0).all()
    assert torch.equal(targets.exact_N, targets.counts_N)


def test_each_draw_is_the_inverse_of_the_cumulative_sum() -> None:
    probs_NV = torch.tensor([[0.5, 0.0, 0.25, 0.25]])
    targets = random_draws(probs_NV, torch.tensor([[0.0, 0.49, 0.5, 0.74, 0.75, 0.999]], dtype=torch.float64))
    assert torch.equal(targets.dense(4) * 6, torch.tensor([[2.0, 0, 2, 2]]))


def test_extreme_uniforms_stay_inside_the_vocabulary(random_rows: Tensor) -> None:
    last = float(np.nextafter(1, 0))
    for scale in (1, 1 + 1e-7, 1 - 1e-7):  # float32 rows sum to 1 only nearly
        probs_NV = random_rows * scale
        probs_NV[:, 600:] = 0
        targets = random_draws(probs_NV, torch.full((12, 3), last, dtype=torch.float64))
        assert targets.ids_T.max() < 600
        assert torch.equal(targets.weights_T, torch.ones(12))
