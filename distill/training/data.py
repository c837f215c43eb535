"""The cache as a LightningDataModule: training samples in a seeded order an epoch, held-out in theirs."""

from __future__ import annotations

from collections.abc import Iterator

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Sampler

from distill.cache.reader import CacheReader


class EpochPermutation(Sampler[int]):
    """A permutation of `size` that is a function of seed and epoch (Lightning calls `set_epoch`)."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.size, generator=generator).tolist())

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

    def train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.train,
            batch_size=self.batch_size,
            sampler=EpochPermutation(len(self.train), self.seed),
            collate_fn=self.train.collate,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> DataLoader | list:
        if self.held_out is None:
            return []
        return DataLoader(self.held_out, batch_size=self.batch_size, collate_fn=self.held_out.collate)
