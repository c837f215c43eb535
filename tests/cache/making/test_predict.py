"""The teacher's batches: made of one shard's samples, and the same ones after an interruption."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distill.cache.format.folder import Manifest
from distill.cache.format.records import Record
from distill.cache.making.extract import extract
from distill.cache.making.predict import ShardBatches, TeacherModule, shard_loader
from distill.models.language_model import Head
from distill.targets import schemes


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


def test_batches_that_go_together_are_those_that_go_alone(make_manifest: Callable[..., Manifest]) -> None:
    """Their number may change from one to the next."""
    manifest = make_manifest(samples=25, shard_samples=8)
    numbers = itertools.cycle([1, 2, 3])
    alone = [*ShardBatches(manifest, [0, 1, 2, 3], lambda shard: 3)]
    found = [*ShardBatches(manifest, [0, 1, 2, 3], lambda shard: 3, together=lambda: next(numbers))]
    assert [len(batch) for batch in found] == [3, 2, 8, 3, 5, 4]
    assert [batch[at : at + 3] for batch in found for at in range(0, len(batch), 3)] == alone


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


class Widths(nn.Module):
    """A teacher that remembers how many positions it read."""

    def __init__(self) -> None:
        super().__init__()
        self.table_VD, self.seen = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), [0]
        self.head = Head(self.table_VD)

    def body(self, input_ids_BL: Tensor, position_ids_BL: Tensor) -> Tensor:
        assert input_ids_BL.shape == position_ids_BL.shape
        self.seen.append(input_ids_BL.shape[1])
        return self.table_VD[input_ids_BL]


@pytest.mark.parametrize(("last", "length", "read"), [(30, 300, 64), (64, 300, 128), (255, 256, 256), (298, 300, 300)])
def test_padding_is_not_read(last: int, length: int, read: int) -> None:
    """A row without packing is one document and its padding; the longest of a batch tells where reading ends."""
    teacher, scheme = Widths(), schemes.make("varopt", threshold=0.1)
    mask_BL = torch.zeros(3, length, dtype=torch.bool)
    mask_BL[0, : last + 1], mask_BL[1, :9] = True, True
    ids_BL = torch.randint(50, (3, length), generator=torch.Generator().manual_seed(1))
    positions_BL = torch.arange(length).expand(3, -1)
    module = TeacherModule(teacher, 50, scheme, seed=1)
    found = module.predict_step({"input_ids": ids_BL, "position_ids": positions_BL, "loss_mask": mask_BL}, 0)
    assert teacher.seen[-1] == read
    for record, *sample in zip(found, teacher.table_VD[ids_BL], ids_BL, positions_BL, mask_BL, strict=True):
        hidden_LD, *rest = sample
        expected = extract(hidden_LD, teacher.head, *rest, scheme, seed=1)
        assert torch.equal(record.targets.ids_T, expected.targets.ids_T)  # type: ignore[union-attr]
        assert len(record.input_ids_L) == len(record.loss_mask_L) == length
    nothing = {"input_ids": ids_BL, "position_ids": positions_BL, "loss_mask": torch.zeros_like(mask_BL)}
    assert len(module.predict_step(nothing, 0)) == 3


@pytest.mark.parametrize("fits", [1, 2, 4])
def test_batches_that_find_no_room_together_go_in_halves(fits: int) -> None:
    """The records are the same, and no batch is made smaller."""
    runs: list[int] = []

    class Together(Widths):
        def bodies(self, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
            runs.append(len(batches))
            if len(batches) > fits:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return [self.body(*batch) for batch in batches]

    ids_BL = torch.randint(50, (7, 64), generator=torch.Generator().manual_seed(1))
    mask_BL = torch.ones(7, 64, dtype=torch.bool)
    batch = {"input_ids": ids_BL, "position_ids": torch.arange(64).expand(7, -1), "loss_mask": mask_BL}
    module = TeacherModule(Together(), 50, schemes.make("varopt", threshold=0.1), seed=1)
    expected = module.predict_step(batch, 0)
    module.batch_size, module.together.batches = 2, 4
    found = module.predict_step(batch, 0)
    assert [encode_of(record) for record in found] == [encode_of(record) for record in expected]
    assert runs == {1: [4, 2], 2: [4, 2, 2], 4: [4]}[fits] and module.together.batches == fits


def encode_of(record: Record) -> list[list[float]]:
    return [record.targets.ids_T.tolist(), record.targets.weights_T.tolist()]  # type: ignore[union-attr]
