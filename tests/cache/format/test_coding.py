"""Stored weights: codes are fine and unbiased; every row sums to 1, none is negative, the mean is the weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from distill.cache.format.coding import (
    CODES,
    SCALAR_STEP,
    VALUES,
    coded_places,
    decode,
    decode_rows,
    encode,
    encode_rows,
    nearby_codes,
    quantize_scalar,
    round_weights,
    stored_atoms,
)
from distill.targets.schemes import RandomDraws, SparseScheme, TopK, VarOpt
from distill.targets.sparse import SparseTargets
from distill.targets.varopt import varopt

LAST_UNIFORM = float(np.nextafter(1, 0))
Rows = tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]


def targets_of(probs_NV: NDArray[np.float64], threshold: float) -> Rows:
    """Weights, exact entries and atoms of varopt's targets."""
    targets = varopt(torch.from_numpy(probs_NV), threshold, torch.full((len(probs_NV),), 0.5).double())
    exact_N = targets.exact_N.numpy()
    return targets.padded()[1].double().numpy(), exact_N, targets.counts_N.numpy() - exact_N


def equal_weights(exact: int, weight: float, tail_tokens: int = 4000) -> NDArray[np.float64]:
    """A row of `exact` tokens of one weight; the rest is spread thinly."""
    rest = 1 - exact * weight
    return np.concatenate([np.full(exact, weight), np.full(tail_tokens, rest / tail_tokens)])[None]


@st.composite
def distributions(draw: st.DrawFn) -> tuple[NDArray[np.float64], float]:
    """A few rows of one vocabulary and a threshold of at least 1/50."""
    threshold = draw(st.sampled_from([1.0, 0.6, 0.5, 0.3, 0.1, 0.05, 0.02]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        logits = generator.normal(size=(4, draw(st.sampled_from([2, 3, 60, 500])))) * draw(st.floats(0, 12))
        probs = np.exp(logits - logits.max(axis=1, keepdims=True))
        return probs / probs.sum(axis=1, keepdims=True), threshold
    exact = draw(st.integers(1, int(1 / threshold)))
    weight = threshold + (1 / exact - threshold) * draw(st.floats(0, 1))
    return equal_weights(exact, weight), threshold


@given(rows=distributions(), seed=st.integers(0, 2**32), extreme=st.sampled_from([None, 0.0, LAST_UNIFORM]))
@settings(max_examples=200, deadline=None)
def test_rows_sum_to_one_and_are_not_negative(
    rows: tuple[NDArray[np.float64], float], seed: int, extreme: float | None
) -> None:
    probs_NV, threshold = rows
    weights_NK, exact_N, atoms_N = targets_of(probs_NV, threshold)
    uniform_NK = np.random.default_rng(seed).random(weights_NK.shape)
    if extreme is not None:  # all roundings upwards at once, or downwards
        uniform_NK[:] = extreme
    codes_C = encode_rows(weights_NK, exact_N, atoms_N, atoms_N * threshold < 0.5, uniform_NK)
    assert len(codes_C) == coded_places(exact_N, atoms_N, atoms_N * threshold < 0.5, weights_NK.shape[1]).sum()
    decoded_NK = decode_rows(codes_C, exact_N, atoms_N, atoms_N * threshold < 0.5)
    np.testing.assert_allclose(decoded_NK.sum(axis=1), 1, atol=1e-12, rtol=0)
    assert decoded_NK.min() >= -1e-15
    # The rest absorbs the others' roundings, of at most 2 % each.
    assert np.abs(decoded_NK - weights_NK).max() <= 0.0201


@given(rows=distributions(), seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_the_mean_over_roundings_is_the_weight(rows: tuple[NDArray[np.float64], float], seed: int) -> None:
    """Every entry, the one that takes the rest too, within 5 standard errors over 2,000 roundings."""
    probs_NV, threshold = rows
    weights_NK, exact_N, atoms_N = targets_of(probs_NV[:1], threshold)
    check_unbiased(weights_NK, exact_N, atoms_N, threshold, seed)


@pytest.mark.parametrize(("exact", "weight"), [(50, 0.02), (49, 0.02), (26, 0.0201), (25, 0.02), (24, 0.0205)])
def test_dozens_of_equal_weights_are_unbiased(exact: int, weight: float) -> None:
    check_unbiased(*targets_of(equal_weights(exact, weight), 0.02), threshold=0.02, seed=0)


def check_unbiased(weights_NK: NDArray, exact_N: NDArray, atoms_N: NDArray, threshold: float, seed: int) -> None:
    repeats = 2000
    weights_RK = weights_NK.repeat(repeats, axis=0)
    exact_R, atoms_R = exact_N.repeat(repeats), atoms_N.repeat(repeats)
    uniform_RK = np.random.default_rng(seed).random(weights_RK.shape)
    codes_C = encode_rows(weights_RK, exact_R, atoms_R, atoms_R * threshold < 0.5, uniform_RK)
    decoded_RK = decode_rows(codes_C, exact_R, atoms_R, atoms_R * threshold < 0.5)
    error_K = decoded_RK.mean(axis=0) - weights_NK[0]
    # Poisson's tail: a rounding that is taken once in repeats times has no standard deviation to speak of.
    step_K = 0.02 * np.maximum(weights_NK[0], 0.02)
    assert (np.abs(error_K) <= 5 * decoded_RK.std(axis=0) / np.sqrt(repeats) + 10 * step_K / repeats + 1e-9).all()


@pytest.mark.parametrize(("exact", "threshold"), [(100, 0.01), (120, 0.005), (900, 0.001), (5000, 0.0002)])
def test_hundreds_of_equal_weights_never_go_negative(exact: int, threshold: float) -> None:
    """If rounding all weights up would leave less than nothing, the row is rounded down instead."""
    weights_NK, exact_N, atoms_N = targets_of(equal_weights(exact, threshold, tail_tokens=10**5), threshold)
    for seed in range(20):
        uniform_NK = np.random.default_rng(seed).random(weights_NK.shape) * (0.01 if seed % 2 else 1)
        codes_C = encode_rows(weights_NK, exact_N, atoms_N, atoms_N * threshold < 0.5, uniform_NK)
        decoded_NK = decode_rows(codes_C, exact_N, atoms_N, atoms_N * threshold < 0.5)
        assert decoded_NK.min() >= -1e-15
        assert decoded_NK.sum() == pytest.approx(1, abs=1e-12)


def test_a_row_is_coded_whatever_its_company(random_rows: torch.Tensor) -> None:
    weights_NK, exact_N, atoms_N = targets_of(random_rows.double().numpy(), 0.02)
    uniform_NK = np.random.default_rng(0).random(weights_NK.shape)
    small_N = atoms_N * 0.02 < 0.5
    together_C = encode_rows(weights_NK, exact_N, atoms_N, small_N, uniform_NK)
    alone = []
    for n, k in enumerate(exact_N + atoms_N):
        row = slice(n, n + 1)
        alone.append(encode_rows(weights_NK[row, :k], exact_N[row], atoms_N[row], small_N[row], uniform_NK[row, :k]))
    assert np.array_equal(together_C, np.concatenate(alone))


def test_nothing_at_all() -> None:
    nothing = np.empty(0, dtype=np.int64)
    assert decode_rows(np.empty(0, np.uint16), nothing, nothing, nothing == 0).shape == (0, 0)
    assert len(encode_rows(np.empty((0, 0)), nothing, nothing, nothing == 0, np.empty((0, 0)))) == 0


def test_codes_that_do_not_fit_the_counts_are_noticed() -> None:
    with pytest.raises(AssertionError):
        decode_rows(np.zeros(5, np.uint16), np.array([2]), np.array([0]), np.array([True]))


def test_scalars() -> None:
    nats = np.array([0.0, -1e-7, 0.0078, 0.0079, 10.0, 1023.9, 5000.0])
    assert quantize_scalar(nats).tolist() == [0, 0, 0, 1, 640, 65530, 65535]
    assert 1 / SCALAR_STEP == 64
    assert CODES <= 2**16


# Schemes.

SPARSE: list[SparseScheme] = [
    VarOpt(0.02),
    VarOpt(0.3),
    VarOpt(1.0),
    TopK(1),
    TopK(40),
    TopK(5000),
    RandomDraws(50),
]


@pytest.mark.parametrize("scheme", SPARSE, ids=repr)
def test_rounded_weights_are_near_sum_to_one_and_come_back(
    random_rows: torch.Tensor, zipf_rows: torch.Tensor, scheme: SparseScheme
) -> None:
    uniform = torch.full((1, 1009), 1 / 1009)
    sure = torch.zeros(1, 1009).index_fill_(1, torch.tensor([5]), 1)
    probs_NV = torch.cat([random_rows, zipf_rows, uniform, sure])
    uniform_NU = np.random.default_rng(0).random((len(probs_NV), scheme.uniforms))
    sampled = scheme.sample(probs_NV, torch.from_numpy(uniform_NU))
    with np.errstate(all="raise", under="ignore"):
        rounded = round_weights(scheme, sampled, uniform_NU)
    assert rounded.weights_T.dtype == torch.float64 and torch.equal(rounded.ids_T, sampled.ids_T)
    assert (rounded.weights_T - sampled.weights_T).abs().max() <= 0.0201
    assert rounded.weights_T.min() >= -1e-15
    assert (rounded.rest_N is None) == (sampled.rest_N is None)
    rest_N: Any = 0
    if rounded.rest_N is not None and sampled.rest_N is not None:
        rest_N = rounded.rest_N
        np.testing.assert_allclose(rounded.rest_N, sampled.rest_N, rtol=0.0201, atol=1e-6)
    np.testing.assert_allclose(rounded.padded()[1].sum(1) + rest_N, 1, atol=1e-12)
    # What is stored gives them back to the last bit.
    codes_C = encode(scheme, rounded)
    exact_N = rounded.exact_N.numpy()
    weights_T, rest = decode(scheme, codes_C, exact_N, stored_atoms(scheme, rounded))
    assert codes_C.dtype == np.uint16 and np.array_equal(weights_T, rounded.weights_T)
    assert rest is None if rounded.rest_N is None else np.array_equal(rest, rounded.rest_N)


@pytest.mark.parametrize("temperature", [1, 2, 4])
@pytest.mark.parametrize("spread", [0.0, 0.3, 2.0, 8.0], ids=lambda spread: f"spread {spread}")
@pytest.mark.parametrize("entries", [1, 8, 64, 900])
def test_top_k_is_unbiased_and_its_weights_near_at_every_temperature(
    temperature: float, spread: float, entries: int
) -> None:
    """Flat rows too: the mean of many codings is the row itself, and no single coding is far from it."""
    repeats, scheme = 1000, TopK(entries)
    logits_V = torch.from_numpy(np.random.default_rng(1).normal(size=1009)) * spread / temperature
    sampled = scheme.sample(logits_V.softmax(0)[None].repeat(repeats, 1), torch.empty(0))
    assert sampled.rest_N is not None
    rounded = round_weights(scheme, sampled, np.random.default_rng(2).random((repeats, scheme.uniforms)))
    assert rounded.rest_N is not None
    true_RK = torch.cat([sampled.padded()[1], sampled.rest_N[:, None]], dim=1).numpy()
    coded_RK = torch.cat([rounded.padded()[1], rounded.rest_N[:, None]], dim=1).numpy()
    assert coded_RK.min() >= 0
    error_K = np.abs(coded_RK.mean(axis=0) - true_RK[0])
    step_K = 0.02 * np.maximum(true_RK[0], true_RK[0].max() / 50)
    assert (error_K <= 5 * coded_RK.std(axis=0) / np.sqrt(repeats) + 10 * step_K / repeats + 1e-9).all()
    # A coded weight is off by 2 % at most, and the errors of all others together are small beside the weight that
    # takes the rest, unless hundreds of equal entries leave none that is larger than the others.
    if entries < 900:
        assert (np.abs(coded_RK - true_RK) <= 0.0201 * true_RK + 0.0201 * true_RK.max()).all()
        assert (coded_RK[:, 0] <= 1.15 * true_RK[:, 0]).all()


def test_a_top_k_cache_made_before_the_switch_is_read_as_it_was_meant() -> None:
    """Its records store no atoms: the first entry takes the rest, and the same bytes come out again."""
    scheme, exact_N, atoms_N = TopK(3), np.array([3, 3]), np.array([0, 0])
    codes_C = np.array([40, 80, 20, 200, 210, 10], dtype=np.uint16)  # two entries and the bucket, twice
    weights_T, rest_N = decode(scheme, codes_C, exact_N, atoms_N)
    assert rest_N is not None and np.array_equal(rest_N, VALUES[[20, 10]])
    np.testing.assert_array_equal(weights_T.reshape(2, 3)[:, 1:], VALUES[[[40, 80], [200, 210]]])
    np.testing.assert_allclose(weights_T.reshape(2, 3).sum(1) + rest_N, 1)
    parts = (torch.zeros(6, dtype=torch.int64), torch.from_numpy(weights_T), torch.from_numpy(exact_N))
    targets = SparseTargets(*parts, torch.from_numpy(exact_N), torch.from_numpy(rest_N))
    assert not stored_atoms(scheme, targets).any()
    assert np.array_equal(encode(scheme, targets), codes_C)


def test_shares_of_draws_are_stored_exactly(random_rows: torch.Tensor) -> None:
    scheme = RandomDraws(50)
    uniform_NU = np.random.default_rng(0).random((12, 50))
    sampled = scheme.sample(random_rows, torch.from_numpy(uniform_NU))
    rounded = round_weights(scheme, sampled, uniform_NU)
    np.testing.assert_allclose(rounded.weights_T, sampled.weights_T, rtol=1e-7)
    np.testing.assert_allclose(rounded.padded()[1].sum(1), 1, rtol=1e-15)


def test_codes_use_other_numbers_than_the_atoms(random_rows: torch.Tensor) -> None:
    """Otherwise the rounding of weights would go with the choice of ids."""
    scheme = VarOpt(0.02)
    uniform_NU = np.random.default_rng(0).random((12, scheme.uniforms))
    sampled = scheme.sample(random_rows, torch.from_numpy(uniform_NU))
    weights_T = round_weights(scheme, sampled, uniform_NU).weights_T
    uniform_NU[:, 0] = 0.999
    assert torch.equal(round_weights(scheme, sampled, uniform_NU).weights_T, weights_T)
    uniform_NU[:, 1:] = 0.999
    assert not torch.equal(round_weights(scheme, sampled, uniform_NU).weights_T, weights_T)


# Codes.


probabilities = st.floats(1e-17, 1.0)


def code_of(value: float, uniform: float) -> int:
    return int(nearby_codes(np.array([value]), np.array([uniform]))[0])


@given(value=probabilities, uniform=st.floats(0, LAST_UNIFORM))
@settings(max_examples=300, deadline=None)
def test_a_code_is_one_of_the_two_neighbours(value: float, uniform: float) -> None:
    decoded = float(VALUES[code_of(value, uniform)])
    assert value / 1.02 * (1 - 1e-6) <= decoded <= value * 1.02 * (1 + 1e-6)
    assert decoded <= 1


@given(value=probabilities)
@settings(max_examples=200, deadline=None)
def test_unbiased_over_a_grid_of_uniforms(value: float) -> None:
    """Over equally spaced uniforms the mean misses by at most one step's share of the grid: no chance involved."""
    grid = (np.arange(1000) + 0.5) / 1000
    mean = VALUES[nearby_codes(np.full(1000, value), grid)].mean()
    assert mean == pytest.approx(value, rel=0.02 / 1000)


def test_unbiased_over_random_uniforms() -> None:
    generator = np.random.default_rng(0)
    for value in (0.7, 0.0213, 1e-5):
        decoded = VALUES[nearby_codes(np.full(100_000, value), generator.random(100_000))]
        assert abs(decoded.mean() - value) <= 4 * decoded.std() / np.sqrt(100_000)
        assert len(set(decoded)) == 2


@given(one=probabilities, other=probabilities, uniform=st.floats(0, LAST_UNIFORM))
@settings(max_examples=200, deadline=None)
def test_a_larger_value_has_no_larger_code(one: float, other: float, uniform: float) -> None:
    small, large = sorted((one, other))
    assert code_of(small, uniform) >= code_of(large, uniform)


def test_every_code_comes_back() -> None:
    """A value that a code stands for is kept, whatever the uniform."""
    every = np.arange(CODES)
    for uniform in (0.0, 0.5, LAST_UNIFORM):
        back = nearby_codes(VALUES[every], np.full(CODES, uniform))
        np.testing.assert_allclose(VALUES[back], VALUES[every], rtol=1e-9)


@pytest.mark.parametrize("uniform", [0.0, LAST_UNIFORM])
def test_extremes(uniform: float) -> None:
    assert code_of(1.0, uniform) == 0
    assert code_of(1 + 1e-6, uniform) == 0  # float32 rows sum to 1 only nearly
    with np.errstate(all="raise"):
        assert code_of(1e-30, uniform) == code_of(0.0, uniform) == CODES - 1
    assert nearby_codes(np.array([]), np.array([])).dtype == np.uint16
