"""Stored weights: every row sums to 1, no weight is negative, and the mean over the roundings is the weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from distill.cache.format import codes
from distill.cache.format.stored import SCALAR_STEP, coded_mask, decode_weights, encode_weights, quantize_scalar
from distill.targets.varopt import varopt

LAST_UNIFORM = float(np.nextafter(1, 0))
Rows = tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]


def targets_of(probs_NV: NDArray[np.float64], threshold: float) -> Rows:
    """Weights, heads and atoms of varopt's targets."""
    targets = varopt(torch.from_numpy(probs_NV), threshold, torch.full((len(probs_NV),), 0.5).double())
    heads_N = targets.heads_N.numpy()
    return targets.weights_NK.double().numpy(), heads_N, targets.counts_N.numpy() - heads_N


def equal_heads(heads: int, weight: float, tail_tokens: int = 4000) -> NDArray[np.float64]:
    """A row of `heads` tokens of one weight; the rest is spread thinly."""
    rest = 1 - heads * weight
    return np.concatenate([np.full(heads, weight), np.full(tail_tokens, rest / tail_tokens)])[None]


@st.composite
def distributions(draw: st.DrawFn) -> tuple[NDArray[np.float64], float]:
    """A few rows of one vocabulary and a threshold of at least 1/50."""
    threshold = draw(st.sampled_from([1.0, 0.6, 0.5, 0.3, 0.1, 0.05, 0.02]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        logits = generator.normal(size=(4, draw(st.sampled_from([2, 3, 60, 500])))) * draw(st.floats(0, 12))
        probs = np.exp(logits - logits.max(axis=1, keepdims=True))
        return probs / probs.sum(axis=1, keepdims=True), threshold
    heads = draw(st.integers(1, int(1 / threshold)))
    weight = threshold + (1 / heads - threshold) * draw(st.floats(0, 1))
    return equal_heads(heads, weight), threshold


@given(rows=distributions(), seed=st.integers(0, 2**32), extreme=st.sampled_from([None, 0.0, LAST_UNIFORM]))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_rows_sum_to_one_and_are_not_negative(
    rows: tuple[NDArray[np.float64], float], seed: int, extreme: float | None
) -> None:
    probs_NV, threshold = rows
    weights_NK, heads_N, atoms_N = targets_of(probs_NV, threshold)
    uniform_NK = np.random.default_rng(seed).random(weights_NK.shape)
    if extreme is not None:  # all roundings upwards at once, or downwards
        uniform_NK[:] = extreme
    codes_C = encode_weights(weights_NK, heads_N, atoms_N, threshold, uniform_NK)
    assert len(codes_C) == coded_mask(heads_N, atoms_N, threshold, weights_NK.shape[1]).sum()
    decoded_NK = decode_weights(codes_C, heads_N, atoms_N, threshold)
    np.testing.assert_allclose(decoded_NK.sum(axis=1), 1, atol=1e-12, rtol=0)
    assert decoded_NK.min() >= -1e-15
    # The rest absorbs the others' roundings, of at most 2 % each.
    assert np.abs(decoded_NK - weights_NK).max() <= 0.0201


@given(rows=distributions(), seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_mean_over_roundings_is_the_weight(rows: tuple[NDArray[np.float64], float], seed: int) -> None:
    """Every entry, the one that takes the rest too, within 5 standard errors over 2,000 roundings."""
    probs_NV, threshold = rows
    weights_NK, heads_N, atoms_N = (column[:1] for column in targets_of(probs_NV, threshold))
    check_unbiased(weights_NK, heads_N, atoms_N, threshold, seed)


@pytest.mark.parametrize(("heads", "weight"), [(50, 0.02), (49, 0.02), (26, 0.0201), (25, 0.02), (24, 0.0205)])
def test_dozens_of_equal_heads_are_unbiased(heads: int, weight: float) -> None:
    check_unbiased(*targets_of(equal_heads(heads, weight), 0.02), threshold=0.02, seed=0)


def check_unbiased(weights_NK: NDArray, heads_N: NDArray, atoms_N: NDArray, threshold: float, seed: int) -> None:
    repeats = 2000
    weights_RK = weights_NK.repeat(repeats, axis=0)
    heads_R, atoms_R = heads_N.repeat(repeats), atoms_N.repeat(repeats)
    uniform_RK = np.random.default_rng(seed).random(weights_RK.shape)
    codes_C = encode_weights(weights_RK, heads_R, atoms_R, threshold, uniform_RK)
    decoded_RK = decode_weights(codes_C, heads_R, atoms_R, threshold)
    error_K = decoded_RK.mean(axis=0) - weights_NK[0]
    # Poisson's tail: a rounding that is taken once in repeats times has no standard deviation to speak of.
    step_K = 0.02 * np.maximum(weights_NK[0], 0.02)
    assert (np.abs(error_K) <= 5 * decoded_RK.std(axis=0) / np.sqrt(repeats) + 10 * step_K / repeats + 1e-9).all()


@pytest.mark.parametrize(("heads", "threshold"), [(100, 0.01), (120, 0.005), (900, 0.001), (5000, 0.0002)])
def test_hundreds_of_equal_heads_never_go_negative(heads: int, threshold: float) -> None:
    """Where all roundings upwards would leave less than nothing, the row is rounded down instead."""
    weights_NK, heads_N, atoms_N = targets_of(equal_heads(heads, threshold, tail_tokens=10**5), threshold)
    for seed in range(20):
        uniform_NK = np.random.default_rng(seed).random(weights_NK.shape) * (0.01 if seed % 2 else 1)
        codes_C = encode_weights(weights_NK, heads_N, atoms_N, threshold, uniform_NK)
        decoded_NK = decode_weights(codes_C, heads_N, atoms_N, threshold)
        assert decoded_NK.min() >= -1e-15
        assert decoded_NK.sum() == pytest.approx(1, abs=1e-12)


def test_a_row_is_coded_whatever_its_company(random_rows: torch.Tensor) -> None:
    weights_NK, heads_N, atoms_N = targets_of(random_rows.double().numpy(), 0.02)
    uniform_NK = np.random.default_rng(0).random(weights_NK.shape)
    together_C = encode_weights(weights_NK, heads_N, atoms_N, 0.02, uniform_NK)
    alone = [
        encode_weights(
            weights_NK[n : n + 1, :k], heads_N[n : n + 1], atoms_N[n : n + 1], 0.02, uniform_NK[n : n + 1, :k]
        )
        for n, k in enumerate(heads_N + atoms_N)
    ]
    assert np.array_equal(together_C, np.concatenate(alone))


def test_nothing_at_all() -> None:
    nothing = np.empty(0, dtype=np.int64)
    assert decode_weights(np.empty(0, np.uint16), nothing, nothing, 0.02).shape == (0, 0)
    assert len(encode_weights(np.empty((0, 0)), nothing, nothing, 0.02, np.empty((0, 0)))) == 0


def test_codes_that_do_not_fit_the_counts_are_noticed() -> None:
    with pytest.raises(AssertionError):
        decode_weights(np.zeros(5, np.uint16), np.array([2]), np.array([0]), 0.02)


def test_scalars() -> None:
    nats = np.array([0.0, -1e-7, 0.0078, 0.0079, 10.0, 1023.9, 5000.0])
    assert quantize_scalar(nats).tolist() == [0, 0, 0, 1, 640, 65530, 65535]
    assert 1 / SCALAR_STEP == 64
    assert codes.CODES <= 2**16
