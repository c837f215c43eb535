"""The teacher's batches: made of one shard's samples, and the same ones after an interruption."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch.utils.data import DataLoader

from distill.cache.format.folder import Manifest
from distill.cache.making.predict import ShardBatches, shard_loader


@pytest.mark.parametrize("batch_size", [1, 3, 4, 5, 100])
def test_batches_stay_in_their_shard(make_manifest: Callable[..., Manifest], batch_size: int) -> None:
    manifest = make_manifest(samples=25, shard_samples=4)
    batches = list(ShardBatches(manifest, [*range(manifest.shards)], lambda shard: batch_size))
    assert [sample for batch in batches for sample in batch] == [*range(25)]
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert all(len({manifest.place(sample)[0] for sample in batch}) == 1 for batch in batches)
    assert len(ShardBatches(manifest, [*range(manifest.shards)], lambda shard: batch_size)) >= len(batches)


def test_finished_batches_are_left_out(make_manifest: Callable[..., Manifest]) -> None:
    manifest = make_manifest(samples=25, shard_samples=4)
    every = list(ShardBatches(manifest, [3, 4], lambda shard: 2))
    assert list(ShardBatches(manifest, [3, 4], lambda shard: 2, lambda shard: 2 * (shard == 3))) == every[1:]


def test_a_shard_whose_batch_was_too_large_begins_anew_in_halves(make_manifest: Callable[..., Manifest]) -> None:
    """All batches of a shard have one size: the one that is written down with it."""
    manifest, size, seen = make_manifest(samples=25, shard_samples=8), 4, []
    sampler = ShardBatches(manifest, [1, 2], lambda shard: size)
    for batch in sampler:
        seen.append(batch)
        size = 2 if len(seen) == 2 else size
    assert seen[:2] == list(ShardBatches(manifest, [1], lambda shard: 4))[:2]
    assert seen[2:] == list(ShardBatches(manifest, [1, 2], lambda shard: 2))
    assert len(seen) <= len(sampler)


@pytest.mark.parametrize("shards", [[], [3], [6], [1, 4, 6], [2, 3, 4, 5, 6]])
def test_a_resumed_run_makes_the_same_batches(make_manifest: Callable[..., Manifest], shards: list[int]) -> None:
    """The teacher's sums depend on the shape of a batch: other batches would be other bytes."""
    manifest = make_manifest(samples=25, shard_samples=4)
    every = list(ShardBatches(manifest, [*range(manifest.shards)], lambda shard: 3))
    assert list(ShardBatches(manifest, shards, lambda shard: 3)) == [
        batch for batch in every if manifest.place(batch[0])[0] in shards
    ]


def test_the_loader_loads_these_batches(make_manifest: Callable[..., Manifest]) -> None:
    loader = shard_loader(range(25), make_manifest(), [0, 6], lambda shard: shard + 3)  # type: ignore[arg-type]
    assert isinstance(loader, DataLoader)
    assert [batch.tolist() for batch in loader] == [[0, 1, 2], [3], [21, 22, 23, 24]]
