"""One cache made by several processes under Lightning's ddp: the shards of each, and a common end."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import cast

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, Dataset

from distill.cache.format.folder import seal
from distill.cache.making.background import BackgroundWriter
from distill.cache.making.predict import ShardWriter, TeacherModule, shard_loader
from distill.cache.making.writer import CacheWriter
from distill.system import slurm
from distill.system.processes import leave_if_not_first, together
from distill.system.progress import Progress

_PATIENCE = timedelta(days=30)
"""Longest time that a process waits for the others at the end, because they are not equally fast."""


def make_trainer(accelerator: str, devices: int = 1, num_nodes: int = 1) -> pl.Trainer:
    """Make a Trainer that predicts. Its `global_rank` is right at once, however the processes were started."""
    return pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=DDPStrategy(timeout=_PATIENCE) if devices * num_nodes > 1 else "auto",
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        inference_mode=False,
        **slurm.trainer_options(),
    )


class ShardShares(pl.LightningDataModule):
    """The samples of the unfinished shards, dealt out to the processes. Each writes its own shards.

    Args:
        samples: `samples[i]` holds `input_ids`, `position_ids`, `loss_mask` of the cache's sample i.
        open_writer: opens the cache; called after the process of rank 0 has done so.
        shards: shards to make, as far as they are missing.
        progress: display of this process's tokens.
        deadline: `time.monotonic()` after which no further batch begins.
    """

    def __init__(
        self,
        samples: Dataset,
        open_writer: Callable[[], CacheWriter],
        shards: Collection[int],
        progress: Progress,
        deadline: float = math.inf,
    ) -> None:
        super().__init__()
        self.deadline = deadline
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer shards than processes
        self.samples, self.open_writer, self.shards, self.progress = samples, open_writer, shards, progress
        self.background = contextlib.ExitStack()
        """Context that ends when this process's shards are on disk."""

    def setup(self, stage: str) -> None:
        """Open the cache and take this process's shards.

        Lightning waits for all processes before this, and before the first batch, so all see the same missing shards.
        """
        assert self.trainer is not None
        self._writer = self.open_writer()
        missing = [shard for shard in self._writer.missing() if shard in self.shards]
        self._mine = missing[self.trainer.global_rank :: self.trainer.world_size]
        self._show_what_is_done(len(missing))
        background = self.background.enter_context(BackgroundWriter(self._writer))
        callbacks: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        callbacks.append(ShardWriter(background, self.progress, self.deadline))

    def _show_what_is_done(self, missing: int) -> None:
        """Show this process's share of the work, and as done the same share of the shards that existed before."""
        assert self.trainer is not None
        manifest = self._writer.manifest
        to_do = sum(len(manifest.shard_range(shard)) for shard in self._mine)
        done = (len(self.shards) - missing) * manifest.shard_samples // self.trainer.world_size
        begun = sum(self._writer.begun(shard) for shard in self._mine)
        self.progress.total = (done + to_do) * manifest.sequence_length
        self.progress.start((done + begun) * manifest.sequence_length)

    def predict_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        writer, is_cuda = self._writer, self.trainer.strategy.root_device.type == "cuda"
        grouped = cast(TeacherModule, self.trainer.lightning_module).together
        grouped.shard_samples = writer.manifest.shard_samples
        return shard_loader(
            self.samples,
            writer.manifest,
            self._mine,
            writer.batch_size,
            writer.begun,
            lambda: grouped.batches,
            is_cuda,
        )

    def teardown(self, stage: str) -> None:
        """Put the journal in order when all processes have written their shards."""
        assert self.trainer is not None
        self.background.close()
        self.trainer.strategy.barrier("shards written")
        if self.trainer.is_global_zero:
            missing = self._writer.missing()
            assert not any(shard in self.shards for shard in missing), "all ended without an error, but shards miss"
            if not missing:
                seal(self._writer.folder)


def predict(trainer: pl.Trainer, module: TeacherModule, shares: ShardShares) -> None:
    """Make the shards. It returns in the process of rank 0 only; the others end here. A failure of one ends all."""
    with together(trainer), shares.background:
        trainer.predict(module, datamodule=shares, return_predictions=False)
    leave_if_not_first(trainer)
