"""The order of an epoch: every sample once, over all processes, and over a stop and a resumption wherever it falls."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import Dataset

from distill.cache.format.records import Record
from distill.cache.reading.batches import Batch, collate
from distill.training.data import CacheDataModule, EpochPermutation, Samples
from distill.training.order import NOTHING, batches_of, permuted

QUIET = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)


def micro_batches(size: int, batch_size: int, rank: int, world: int, seen: int = 0, epoch: int = 0) -> list[list[int]]:
    """As torch's DataLoader cuts them."""
    sampler = EpochPermutation(size, 7, epoch, seen, batch_size=batch_size, rank=rank, world=world)
    numbers = list(sampler)
    if not seen:
        assert len(sampler) == len(numbers)
    return [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]


# The permutation.


@given(size=st.integers(1, 5000), seed=st.integers(0, 2**63), epoch=st.integers(0, 2**31))
def test_a_bijection(size: int, seed: int, epoch: int) -> None:
    order = permuted(np.arange(size), size, seed, epoch)
    assert np.array_equal(np.sort(order), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 2**16 - 1, 2**16, 2**16 + 1])
def test_a_bijection_at_the_edges(size: int) -> None:
    assert np.array_equal(np.sort(permuted(np.arange(size), size, 1, 2)), np.arange(size))


def test_a_place_does_not_need_the_others() -> None:
    """Constant memory: of 2^40 samples, the same few places in one call or in many."""
    places = np.array([0, 1, 12345, 2**39, 2**40 - 1])
    together = permuted(places, 2**40, 3, 1)
    assert [int(permuted(places[i : i + 1], 2**40, 3, 1)[0]) for i in range(5)] == together.tolist()
    assert len(set(together.tolist())) == 5 and together.max() < 2**40 and together.min() >= 0


@pytest.mark.parametrize("size", [7, 64, 100])
def test_every_sample_comes_to_every_place_equally_often(size: int) -> None:
    """Chi-square of (place, sample) over 4,000 epochs, five standard deviations wide; and of (first, second) pairs."""
    epochs, places = 4000, np.arange(size)
    counts, pairs = np.zeros((size, size)), np.zeros((size, size))
    for epoch in range(epochs):
        order = permuted(places, size, 11, epoch)
        counts[places, order] += 1
        np.add.at(pairs, (order[:-1], order[1:]), 1)
    expected = epochs / size
    freedom = (size - 1) ** 2
    assert abs(((counts - expected) ** 2 / expected).sum() - freedom) < 5 * np.sqrt(2 * freedom)
    assert pairs.diagonal().sum() == 0
    off = pairs[~np.eye(size, dtype=bool)]
    assert abs(((off - off.mean()) ** 2 / off.mean()).sum() / len(off) - 1) < 5 * np.sqrt(2 / len(off)) + 2 / size


def test_seed_and_epoch_do_not_blend() -> None:
    """Seed 1, epoch 0 is not seed 0, epoch anything: no run repeats another's epochs."""
    orders = {tuple(permuted(np.arange(50), 50, seed, epoch)) for seed in range(30) for epoch in range(30)}
    assert len(orders) == 900


# Shares of processes.


@given(size=st.integers(1, 200), batch_size=st.integers(1, 9), world=st.integers(1, 9))
@settings(max_examples=200)
def test_processes_share_an_epoch(size: int, batch_size: int, world: int) -> None:
    shares = [micro_batches(size, batch_size, rank, world) for rank in range(world)]
    seen = [number for share in shares for batch in share for number in batch if number != NOTHING]
    assert sorted(seen) == list(range(size))  # all, none twice
    assert {len(share) for share in shares} == {batches_of(size, batch_size, world)}  # in step
    for share in shares:
        assert all(NOTHING not in batch or batch == [NOTHING] for batch in share)
        assert all(NOTHING not in batch for batch in share[:-1])
        assert all(len(batch) == batch_size for batch in share[:-1])


@given(size=st.integers(1, 100), batch_size=st.integers(1, 5), world=st.integers(1, 4), data=st.data())
def test_what_is_left_of_an_epoch_is_the_rest_of_it(
    size: int, batch_size: int, world: int, data: st.DataObject
) -> None:
    done = data.draw(st.integers(0, batches_of(size, batch_size, world) - 1))
    for rank in range(world):
        whole = micro_batches(size, batch_size, rank, world, epoch=3)
        assert micro_batches(size, batch_size, rank, world, done * batch_size * world, epoch=3) == whole[done:]


def test_the_number_of_processes_does_not_change_a_step() -> None:
    """Two processes with micro-batches of 3 see in each step the samples that one with 6 sees."""
    one = micro_batches(32, 6, 0, 1)
    two = zip_longest(*(micro_batches(32, 3, rank, 2) for rank in range(2)), fillvalue=[])
    assert [sorted(batch) for batch in one] == [sorted([*a, *b]) for a, b in two]


# Lightning, stopped and resumed.


class Numbers(Dataset[int]):
    """A stand-in for a cache: sample i is i."""

    def __init__(self, size: int) -> None:
        self.size, self.manifest = size, SimpleNamespace(scheme_parameters={})

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows)


class Watch(pl.LightningModule):
    """Notes the samples of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, int]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.extend((self.current_epoch, number) for number in batch.tolist())
        return self.weight * 0

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stop(pl.Callback):
    """Saves and stops after so many micro-batches in all, as an interruption does."""

    def __init__(self, after: int, path: Path) -> None:
        self.left, self.path = after, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path, weights_only=False)
            raise KeyboardInterrupt


def fit(
    callbacks: list[pl.Callback], resume: Path | None = None, workers: int = 0, held_out: Any = None, **options: Any
) -> list[tuple[int, int]]:
    """The (epoch, sample) pairs of a training of three epochs of 13 samples in micro-batches of 3."""
    module = Watch()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=3, num_sanity_val_steps=0, callbacks=callbacks, **{**QUIET, **options}
    )
    data = CacheDataModule(Numbers(13), held_out, step_samples=3, batch_size=3, seed=5, num_workers=workers)  # type: ignore[arg-type]
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    except (KeyboardInterrupt, SystemExit):  # Lightning makes the one the other
        assert trainer.interrupted
    return module.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("after", "workers"), [*((after, 0) for after in range(1, 16)), (2, 2), (5, 2), (9, 2)])
def test_a_stop_after_any_batch_loses_and_doubles_nothing(tmp_path: Path, after: int, workers: int) -> None:
    whole = fit([], enable_checkpointing=False)
    assert sorted(whole) == [(epoch, number) for epoch in range(3) for number in range(13)]
    checkpoint = tmp_path / "last.ckpt"
    first = fit([Stop(after, checkpoint)], workers=workers, enable_checkpointing=False)
    second = fit([], resume=checkpoint, workers=workers, enable_checkpointing=False)
    assert first + second == whole


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("after", [1, 4, 7, 13])
def test_stopped_twice(tmp_path: Path, after: int) -> None:
    whole = fit([], enable_checkpointing=False)
    first = fit([Stop(after, tmp_path / "1.ckpt")], enable_checkpointing=False)
    second = fit([Stop(2, tmp_path / "2.ckpt")], resume=tmp_path / "1.ckpt", enable_checkpointing=False)
    third = fit([], resume=tmp_path / "2.ckpt", enable_checkpointing=False)
    assert first + second + third == whole


@pytest.mark.filterwarnings("ignore")
def test_from_the_checkpoint_of_an_epochs_end(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = fit([keep])
    for epoch in range(2):
        resumed = fit([], resume=tmp_path / f"epoch={epoch}.ckpt", enable_checkpointing=False)
        assert resumed == whole[13 * (epoch + 1) :]


def test_other_devices_continue_where_one_stopped() -> None:
    """As many samples a step of all of them together: the same steps, dealt out."""
    one = CacheDataModule(Numbers(13), None, step_samples=4, batch_size=4, seed=5)  # type: ignore[arg-type]
    one.load_state_dict({"epoch": 1, "seen": 4})
    rest = list(one.train_dataloader().sampler)
    shares = []
    for rank in range(2):
        half = CacheDataModule(Numbers(13), None, step_samples=2, batch_size=2, seed=5)  # type: ignore[arg-type]
        half.trainer = SimpleNamespace(global_rank=rank, world_size=2)  # type: ignore[assignment]
        half.load_state_dict({"epoch": 1, "seen": 4})
        shares.append(list(half.train_dataloader().sampler))
    for step in range(2):
        together = shares[0][2 * step : 2 * step + 2] + shares[1][2 * step : 2 * step + 2]
        assert sorted(together) == sorted(rest[4 * step : 4 * step + 4])
    assert sorted(number for share in shares for number in share if number != NOTHING) == sorted(rest)


# NOTHING, in a real step and in real processes.


class Listed(list):  # type: ignore[type-arg]
    """Records as a reader."""

    def collate(self, records: list[Record]) -> Batch:
        return collate(records)


@pytest.fixture
def reader(records: list[Record]) -> Listed:
    return Listed(records)


def test_nothing_is_a_batch_without_a_position(reader: Listed) -> None:
    samples = Samples(reader)  # type: ignore[arg-type]
    batch = samples.collate([samples[NOTHING]])
    assert not batch.loss_mask_BL.any() and len(batch.entropy_N) == len(batch.targets.ids_T) == 0  # type: ignore[union-attr]


SCRIPT = """
import json, sys
import torch
sys.path[:0] = json.loads(sys.argv[1])
from test_resume_order import Numbers, QUIET, Watch
import lightning.pytorch as pl
from distill.training.data import CacheDataModule

class Told(Watch):
    def training_step(self, batch, batch_idx):
        numbers = [int(n) for n in batch]
        print(json.dumps([self.current_epoch, batch_idx, numbers]), file=log, flush=True)
        return self.weight * 0

trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, use_distributed_sampler=False,
                     num_sanity_val_steps=0, enable_checkpointing=False, **QUIET)
log = open(f"{sys.argv[2]}/rank{trainer.global_rank}", "w")
class Numbered(CacheDataModule):
    def train_dataloader(self):
        loader = super().train_dataloader()
        loader.collate_fn = lambda rows: torch.tensor([-1 if row is None else row for row in rows])
        return loader
trainer.fit(Told(), datamodule=Numbered(Numbers(9), Numbers(3), step_samples=2, batch_size=2, seed=5))
"""


def test_two_processes_of_lightning_see_every_sample_once(tmp_path: Path) -> None:
    """9 samples in rounds of 2 x 2: of the last round one process has the one sample, the other NOTHING."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    here = Path(__file__).resolve()
    paths = json.dumps([str(here.parents[2]), str(here.parent)])
    result = subprocess.run(
        [sys.executable, script, paths, tmp_path], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    logs = [[json.loads(line) for line in (tmp_path / f"rank{rank}").read_text().splitlines()] for rank in range(2)]
    for epoch in range(2):
        batches = [[numbers for e, _, numbers in log if e == epoch] for log in logs]
        assert [len(share) for share in batches] == [3, 3]
        assert sorted(number for share in batches for batch in share for number in batch) == [NOTHING, *range(9)]
    assert logs[0][:3] != logs[0][3:]
