"""Random numbers of a sample: a function of seed and content, and of nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from distill.targets.uniforms import sample_uniforms

IDS = np.array([5, 6, 7, 5, 6, 7, 5, 6])
POSITIONS = np.array([0, 1, 2, 3, 4, 0, 1, 2])


def test_the_same_again() -> None:
    np.random.seed(1)
    first = sample_uniforms(3, IDS, POSITIONS, 7)
    np.random.seed(2)
    sample_uniforms(4, IDS[::-1], POSITIONS, 2)
    assert np.array_equal(first, sample_uniforms(3, IDS.copy(), POSITIONS.copy(), 7))


def test_known_numbers() -> None:
    """Caches are continued by later versions on other machines: the numbers must never change."""
    found = sample_uniforms(0, IDS, POSITIONS, 2)[:2].ravel()
    assert found.tolist() == [0.24113772298017933, 0.7983728435729497, 0.9551762842236046, 0.05293082486807066]


@pytest.mark.parametrize("dtype", [np.int64, np.uint32, np.int32, np.uint16])
def test_the_type_of_the_ids_does_not_matter(dtype: type) -> None:
    expected = sample_uniforms(3, IDS, POSITIONS, 7)
    assert np.array_equal(expected, sample_uniforms(3, IDS.astype(dtype), POSITIONS.astype(dtype), 7))
    strided = np.repeat(IDS.astype(dtype), 2)[::2]
    assert np.array_equal(expected, sample_uniforms(3, strided, POSITIONS, 7))


def test_seed_ids_documents_and_places_all_matter() -> None:
    """No number occurs twice in any of them."""
    other_ids, other_positions = IDS.copy(), POSITIONS.copy()
    other_ids[-1] += 1
    other_positions[5:] = [5, 6, 7]
    tables = [
        sample_uniforms(3, IDS, POSITIONS, 7),
        sample_uniforms(4, IDS, POSITIONS, 7),
        sample_uniforms(3, other_ids, POSITIONS, 7),
        sample_uniforms(3, IDS, other_positions, 7),
        sample_uniforms(3, POSITIONS, IDS, 7),
        sample_uniforms(2**63, IDS, POSITIONS, 7),
    ]
    assert len(np.unique(np.stack(tables))) == len(tables) * len(IDS) * 7


def test_they_are_uniform() -> None:
    numbers = np.sort(sample_uniforms(0, np.arange(1000), np.arange(1000), 20).ravel())
    assert numbers[0] >= 0 and numbers[-1] < 1
    # Kolmogorov and Smirnov: beyond 1.95 once in a thousand times.
    assert np.abs(numbers - (np.arange(20_000) + 0.5) / 20_000).max() * np.sqrt(20_000) < 1.95
