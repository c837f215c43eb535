"""The cache as a LightningDataModule: training samples in a seeded order an epoch, held-out in theirs."""

from __future__ import annotations

from collections.abc import Iterator

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Sampler

from distill.cache.reader import CacheReader


class EpochPermutation(Sampler[int]):
    """A permutation of `size` that is a function of seed and epoch (Lightning calls `set_epoch`).

    Of epoch `first_epoch` the first `seen` samples are left out: Lightning continues an epoch without going over the
    data that it had before. The length stays that of a whole epoch, which is how Lightning counts batches.
    """

    def __init__(self, size: int, seed: int, first_epoch: int = 0, seen: int = 0) -> None:
        self.size, self.seed, self.epoch = size, seed, first_epoch
        self.first_epoch, self.seen = first_epoch, seen

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        start = self.seen if self.epoch == self.first_epoch else 0
        return iter(torch.randperm(self.size, generator=generator).tolist()[start:])

    def __len__(self) -> int:
        return self.size


class CacheDataModule(pl.LightningDataModule):
    """Batches of a cache; `held_out` may be None."""

    def __init__(
        self, train: CacheReader, held_out: CacheReader | None, batch_size: int, seed: int, num_workers: int = 0
    ) -> None:
        super().__init__()
        self.train, self.held_out = train, held_out
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self._begin = 0, 0

    def train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.train,
            batch_size=self.batch_size,
            sampler=EpochPermutation(len(self.train), self.seed, *self._begin),
            collate_fn=self.train.collate,
            num_workers=self.num_workers,
        )

    def state_dict(self) -> dict[str, int]:
        """Part of a checkpoint: the epoch under way, and how many of its samples were seen."""
        assert self.trainer is not None
        loop = self.trainer.fit_loop
        epoch, batches = loop.epoch_progress.current.processed, loop.epoch_loop.batch_progress.current.ready
        seen = batches * self.batch_size
        return {"epoch": epoch, "seen": seen} if seen < len(self.train) else {"epoch": epoch + 1, "seen": 0}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._begin = state_dict["epoch"], state_dict["seen"]

    def val_dataloader(self) -> DataLoader | list:
        if self.held_out is None:
            return []
        return DataLoader(self.held_out, batch_size=self.batch_size, collate_fn=self.held_out.collate)
