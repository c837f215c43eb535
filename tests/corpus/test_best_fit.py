"""Best-fit packing: no bin is over its capacity, bins are as a naive program fills them, more lengths change no bin."""

from __future__ import annotations

import numpy as np
import pytest

from distill.corpus.best_fit import best_fit


def naive(lengths: list[int], capacity: int) -> list[list[int]]:
    """The bins of one window, each sorted, in the order of their first item."""
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        rooms = [(capacity - sum(lengths[i] for i in found), number) for number, found in enumerate(bins)]
        fitting = [room for room in rooms if room[0] >= lengths[item]]
        if fitting:
            bins[min(fitting)[1]].append(item)
        else:
            bins.append([item])
    return sorted(sorted(found) for found in bins)


@pytest.mark.parametrize("seed", range(8))
def test_bins_are_those_of_the_naive_program(seed: int) -> None:
    random = np.random.default_rng(seed)
    capacity = int(random.integers(1, 50))
    lengths = random.integers(1, capacity + 1, size=int(random.integers(1, 60)))
    found = best_fit(lengths, capacity)
    rooms = [capacity - lengths[found == number].sum() for number in range(found.max() + 1)]
    assert min(rooms) >= 0
    bins = [np.flatnonzero(found == number).tolist() for number in range(found.max() + 1)]
    assert bins == sorted(bins), "bins are numbered by their first item"
    # Bins of equal room may be filled in another order, so their contents are compared by length.
    expected = naive(lengths.tolist(), capacity)
    assert sorted(sorted(lengths[b].tolist()) for b in bins) == sorted(sorted(lengths[b].tolist()) for b in expected)


def test_windows_are_packed_by_themselves() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, size=1000)
    whole, part = best_fit(lengths, 100, window=64), best_fit(lengths[:640], 100, window=64)
    assert (whole[:640] == part).all() and whole[640] == part.max() + 1
    assert len(best_fit(lengths[:0], 100)) == 0


def test_padding_is_small() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 4096).astype(int), 1, 1024)
    assert lengths.sum() > 0.99 * 1024 * (best_fit(lengths, 1024).max() + 1)
