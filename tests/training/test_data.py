"""The order of training: a permutation of seed and epoch, new each epoch, the same again in a second run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from distill.cache.format.records import Record
from distill.cache.making.extract import extract
from distill.cache.reading.batches import Batch, collate
from distill.models.language_model import Head
from distill.targets.schemes import VarOpt
from distill.training.data import CacheDataModule, EpochPermutation, Samples
from distill.training.order import NOTHING


def order(size: int, seed: int, epoch: int) -> list[int]:
    sampler = EpochPermutation(size, seed)
    sampler.set_epoch(epoch)
    assert len(sampler) == size
    return list(sampler)


def test_a_permutation_of_seed_and_epoch() -> None:
    orders = [order(100, seed, epoch) for seed in range(5) for epoch in range(5)]
    assert all(sorted(numbers) == list(range(100)) for numbers in orders)
    assert len({tuple(numbers) for numbers in orders}) == 25
    torch.manual_seed(9)
    assert orders == [order(100, seed, epoch) for seed in range(5) for epoch in range(5)]


def test_sizes_zero_and_one() -> None:
    assert order(0, 1, 1) == [] and order(1, 1, 1) == [0]


class Numbers(Dataset[int]):
    """A stand-in for a cache: sample i is i."""

    manifest = SimpleNamespace(scheme_parameters={})

    def __len__(self) -> int:
        return 13

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows)


class Watch(pl.LightningModule):
    """Notes which samples it is shown in each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: dict[int, list[int]] = {}
        self.held_out: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.setdefault(self.current_epoch, []).extend(batch.tolist())
        return self.weight * 0

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.held_out.extend(batch.tolist())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def watch(seed: int, held_out: Any = None) -> Watch:
    module = Watch()
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_epochs=3, num_sanity_val_steps=0, **quiet)
    trainer.fit(module, datamodule=CacheDataModule(Numbers(), held_out, step_samples=4, batch_size=4, seed=seed))  # type: ignore[arg-type]
    return module


def test_lightning_goes_through_all_samples_in_a_new_order_each_epoch() -> None:
    seen = watch(seed=3).seen
    assert {epoch: order(13, 3, epoch) for epoch in range(3)} == seen
    assert watch(seed=3).seen == seen
    assert watch(seed=4).seen[0] != seen[0]


def test_held_out_samples_come_in_their_own_order() -> None:
    assert watch(0, Numbers()).held_out == [*range(13)] * 3


# Several draws, used in turn.

DRAWS, SIZE, SEED = 3, 13, 5


class Cached(Dataset[Record]):
    """Thirteen samples with three draws each, as a reader gives them."""

    def __init__(self, draws: int = DRAWS) -> None:
        self.scheme = VarOpt(0.1, draws)
        self.manifest = SimpleNamespace(scheme_parameters={"threshold": 0.1, "draws": draws})
        generator = torch.Generator().manual_seed(1)
        head, mask_L = Head(torch.randn(101, 6, generator=generator)), torch.arange(9) < 8
        self.records = []
        for _ in range(SIZE):
            ids_L, places_L = torch.randint(101, (9,), generator=generator), torch.arange(9)
            hidden_LD = torch.randn(9, 6, generator=generator)
            targets = extract(hidden_LD, head, ids_L, places_L, mask_L, self.scheme, seed=0)
            as_stored = (column.numpy().astype(np.uint32) for column in (ids_L, places_L))
            self.records.append(Record(*as_stored, mask_L.numpy(), targets))

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < SIZE:
            raise IndexError(index)
        return self.records[index]

    def collate(self, records: list[Record]) -> Batch:
        return collate(records, self.scheme)

    def expected(self, numbers: list[int], draw: int) -> list[Tensor]:
        """The ids of the targets of micro-batches of four."""
        batches = [numbers[start : start + 4] for start in range(0, len(numbers), 4)]
        made = [collate([self.records[number] for number in batch], self.scheme, draw) for batch in batches]
        return [batch.targets.ids_NK for batch in made]  # type: ignore[union-attr]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


class Drawn(Watch):
    """Notes the targets it is shown in each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: dict[int, list[Tensor]] = {}
        self.measured: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.ids.setdefault(self.current_epoch, []).append(batch.targets.ids_NK)
        return self.weight * 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.measured.append(batch.targets.ids_NK)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_uses_its_draw_of_every_sample(workers: int) -> None:
    """Epoch e takes draw e % 3 whoever reads it; the order is that of a cache with one draw; measured is the first."""
    cached, module = Cached(), Drawn()
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_epochs=5, num_sanity_val_steps=0, **quiet)
    data: Any = CacheDataModule(cached, cached, step_samples=4, batch_size=4, seed=SEED, num_workers=workers)  # type: ignore[arg-type]
    trainer.fit(module, datamodule=data)
    assert [*module.ids] == [0, 1, 2, 3, 4]
    for epoch, found in module.ids.items():
        assert_same(found, cached.expected(order(SIZE, SEED, epoch), epoch % DRAWS))
    assert_same(module.measured, cached.expected([*range(SIZE)], 0) * 5)
    for draw in range(1, DRAWS):  # or nothing would be shown by this
        assert any(
            (one != other).any() for one, other in zip(*(cached.expected([0], d) for d in (0, draw)), strict=True)
        )


@pytest.mark.parametrize("epoch", [0, 1, 2, 4])
def test_a_resumed_epoch_goes_on_with_its_draw(epoch: int) -> None:
    cached = Cached()
    data: Any = CacheDataModule(cached, None, step_samples=4, batch_size=4, seed=SEED)  # type: ignore[arg-type]
    data.load_state_dict({"epoch": epoch, "seen": 8, "processes": 1})
    loader = data.train_dataloader()
    assert_same(
        [batch.targets.ids_NK for batch in loader], cached.expected(order(SIZE, SEED, epoch)[8:], epoch % DRAWS)
    )
    loader.sampler.set_epoch(epoch + 1)
    following = cached.expected(order(SIZE, SEED, epoch + 1), (epoch + 1) % DRAWS)
    assert_same([batch.targets.ids_NK for batch in loader], following)


def test_all_processes_take_the_same_draw() -> None:
    for epoch in range(4):
        numbers: list[int] = []
        for rank in range(3):
            sampler = EpochPermutation(SIZE, SEED, epoch, batch_size=2, rank=rank, world=3, draws=DRAWS)
            numbers += [number for number in sampler if number != NOTHING]
        assert sorted(numbers) == [SIZE * (epoch % DRAWS) + sample for sample in range(SIZE)]


def test_one_draw_is_what_it_was() -> None:
    cached = Cached(draws=1)
    samples = Samples(cached)  # type: ignore[arg-type]
    assert all(samples[number] is cached.records[number] for number in range(SIZE))
    for epoch in range(3):
        assert list(EpochPermutation(SIZE, SEED, epoch, draws=1)) == list(EpochPermutation(SIZE, SEED, epoch))
        assert max(EpochPermutation(SIZE, SEED, epoch)) == SIZE - 1


def test_a_draw_changes_the_ids_of_atoms_and_nothing_else() -> None:
    cached = Cached()
    samples = Samples(cached)  # type: ignore[arg-type]
    for number, record in enumerate(cached.records):
        for draw in range(DRAWS):
            drawn = samples[SIZE * draw + number]
            assert drawn is not None
            assert drawn.targets.ids_T.tolist() == record.targets.draw(draw).tolist()  # type: ignore[union-attr]
            for field in ("heads_N", "atoms_N", "codes_C", "entropy_N", "surprisal_N"):
                assert getattr(drawn.targets, field) is getattr(record.targets, field)
            assert drawn.input_ids_L is record.input_ids_L and drawn.loss_mask_L is record.loss_mask_L
