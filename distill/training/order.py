"""The order of an epoch without a table: a keyed permutation computed place by place, and each process's share of it.

With `world` processes and batches of `batch_size` samples, the epoch's places 0 … size - 1 are cut into steps of
world * batch_size. In a step every process takes its own batch_size places. The places left at the end are dealt out
one by one, so that every sample is seen once and every process has equally many batches. A process that gets none
of the last places is given the sentinel NOTHING: a batch that counts no position. (Torch's DistributedSampler would
see some samples twice there.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

NOTHING = -1
"""Sentinel: this process has no sample left, but must still join the step's collectives."""

ROUNDS = 8


def permuted(places: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the sample at each place of an epoch's order: a bijection of 0 … size - 1 that seed and epoch choose.

    A Feistel network over the next power of four, walked along its cycles until it is back below `size` (less than four
    times on average). It needs no memory for any size. Source: Black and Rogaway 2002, Ciphers with Arbitrary Finite
    Domains, method 2.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = np.frombuffer(hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * ROUNDS).digest(), dtype="<u8")
    values = places.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        values[outside] = _encrypted(values[outside], np.uint64(half), keys)
        outside = values >= size
    return values.astype(np.int64)


def _encrypted(values: NDArray[np.uint64], half: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a permutation of the numbers of 2 * half bits."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << half) | right


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix the bits so that each depends on every other one (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def batches_of(size: int, batch_size: int, world: int) -> int:
    """Return the number of batches of each process in an epoch."""
    return -(-size // (batch_size * world))


def share(size: int, batch_size: int, rank: int, world: int, seen: int = 0) -> Iterator[NDArray[np.int64]]:
    """Yield the places of each batch of process `rank`, after the first `seen` (whole steps), or NOTHING."""
    for start in range(seen, size, batch_size * world):
        left = size - start
        if left >= batch_size * world:
            yield np.arange(start + rank * batch_size, start + (rank + 1) * batch_size)
        elif rank < left:
            yield np.arange(start + rank, size, world)
        else:
            yield np.array([NOTHING])
