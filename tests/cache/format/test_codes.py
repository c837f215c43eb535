"""Head codes: fine, monotone, unbiased, safe at the ends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.cache.format import codes

probabilities = st.floats(1e-17, 1.0)
LAST_UNIFORM = float(np.nextafter(1, 0))


def encode(value: float, uniform: float) -> int:
    return int(codes.encode(np.array([value]), np.array([uniform]))[0])


@given(value=probabilities, uniform=st.floats(0, LAST_UNIFORM))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_a_code_is_one_of_the_two_neighbours(value: float, uniform: float) -> None:
    decoded = float(codes.decode(np.array([encode(value, uniform)]))[0])
    assert value / 1.02 * (1 - 1e-6) <= decoded <= value * 1.02 * (1 + 1e-6)
    assert decoded <= 1


@given(value=probabilities)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_unbiased_over_a_grid_of_uniforms(value: float) -> None:
    """Over equally spaced uniforms the mean misses by at most one step's share of the grid: no chance involved."""
    grid = (np.arange(1000) + 0.5) / 1000
    mean = codes.decode(codes.encode(np.full(1000, value), grid)).mean()
    assert mean == pytest.approx(value, rel=0.02 / 1000)


def test_unbiased_over_random_uniforms() -> None:
    generator = np.random.default_rng(0)
    for value in (0.7, 0.0213, 1e-5):
        decoded = codes.decode(codes.encode(np.full(100_000, value), generator.random(100_000)))
        assert abs(decoded.mean() - value) <= 4 * decoded.std() / np.sqrt(100_000)
        assert len(set(decoded)) == 2


@given(one=probabilities, other=probabilities, uniform=st.floats(0, LAST_UNIFORM))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_larger_value_has_no_larger_code(one: float, other: float, uniform: float) -> None:
    small, large = sorted((one, other))
    assert encode(small, uniform) >= encode(large, uniform)


def test_every_code_comes_back() -> None:
    """A value that a code stands for is kept, whatever the uniform."""
    every = np.arange(codes.CODES)
    for uniform in (0.0, 0.5, LAST_UNIFORM):
        back = codes.encode(codes.decode(every), np.full(codes.CODES, uniform))
        np.testing.assert_allclose(codes.decode(back), codes.decode(every), rtol=1e-9)


@pytest.mark.parametrize("uniform", [0.0, LAST_UNIFORM])
def test_extremes(uniform: float) -> None:
    assert encode(1.0, uniform) == 0
    assert encode(1 + 1e-6, uniform) == 0  # float32 rows sum to 1 only nearly
    with np.errstate(all="raise"):
        assert encode(1e-30, uniform) == encode(0.0, uniform) == codes.CODES - 1
    assert codes.encode(np.array([]), np.array([])).dtype == np.uint16
