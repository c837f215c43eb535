"""The order of training: a permutation of seed and epoch, new each epoch, the same again in a second run."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from distill.errors import UserError
from distill.training.data import CacheDataModule, EpochPermutation, ReadAhead


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


class Asked(Dataset[int]):
    """Ten samples, which tell when one of the second batch is read; the last one is damaged."""

    def __init__(self) -> None:
        self.second = threading.Event()

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        if index >= 2:
            self.second.set()
        if index == 9:
            raise UserError("sample 9 cannot be read")
        return index


def test_the_next_batch_is_read_while_the_caller_has_this_one() -> None:
    samples = Asked()
    batches = iter(ReadAhead(samples, batch_size=2))
    assert next(batches).tolist() == [0, 1]
    assert samples.second.wait(30), "nobody has asked for the second batch"
    assert [next(batches).tolist() for _ in range(3)] == [[2, 3], [4, 5], [6, 7]]
    with pytest.raises(UserError, match="sample 9"):
        next(batches)
