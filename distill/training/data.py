"""The cache as a LightningDataModule: the samples of a step as one batch, in an order chosen by seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import lightning.pytorch as pl
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from distill.cache.format.records import Record
from distill.cache.reading.batches import Batch
from distill.cache.reading.mixture import MixedReader
from distill.cache.reading.reader import CacheReader
from distill.corpus.splitting import spread
from distill.models.vocabulary import Vocabulary
from distill.training.order import NOTHING, batches_of, permuted, share
from distill.training.vocabulary import trim_batch


class EpochPermutation(Sampler[int]):
    """A process's samples, in an order of all of them that is a function of seed and epoch (Lightning sets the epoch).

    The first `seen` samples (of all processes together) of epoch `first_epoch` are left out: Lightning continues an
    epoch without going over the data that it had before. The length stays that of a whole epoch, as Lightning counts
    batches. Without a seed the order is that of the cache.
    """

    def __init__(
        self,
        size: int,
        seed: int | None,
        first_epoch: int = 0,
        seen: int = 0,
        *,
        batch_size: int = 1,
        rank: int = 0,
        world: int = 1,
        mixture: MixedReader | None = None,
    ) -> None:
        assert seen % (batch_size * world) == 0, "an epoch is left between two steps"
        self.size, self.seed, self.epoch = size, seed, first_epoch
        self.first_epoch, self.seen = first_epoch, seen
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.mixture = mixture
        """Several caches, of which an epoch has shares; None for one cache."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        # The epoch is copied, because a worker's prefetching may outlast it.
        epoch = self.epoch
        seen = self.seen if epoch == self.first_epoch else 0
        for places in share(self.size, self.batch_size, self.rank, self.world, seen):
            if self.seed is None or places[0] == NOTHING:
                yield from places.tolist()
            else:
                chosen = permuted(places, self.size, self.seed, epoch)
                yield from (chosen if self.mixture is None else self._mixed(self.mixture, chosen, epoch)).tolist()

    def _mixed(self, mixture: MixedReader, places: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Return the samples of several caches at places of an epoch. Each cache has an order of its own."""
        assert self.seed is not None
        samples = np.empty_like(places)
        for number, here, before in mixture.places(places, epoch):
            rounds, within = np.divmod(before, mixture.size(number))
            for each in np.unique(rounds).tolist():
                of_round = rounds == each
                seed = self.seed + ((number + 1) << 64)
                found = permuted(within[of_round], mixture.size(number), seed, each)
                samples[here[of_round]] = mixture.sample(number, found)
        return samples

    def __len__(self) -> int:
        whole, left = divmod(self.size, self.batch_size * self.world)
        dealt = len(range(self.rank, left, self.world))
        return whole * self.batch_size + (max(dealt, 1) if left else 0)


class Samples(Dataset[Record | None]):
    """The samples of a cache by the numbers that a sampler gives, including the sentinel, and their batches.

    With a `vocabulary` they are in the ids of a student that has only some of the teacher's tokens.
    """

    def __init__(self, reader: CacheReader | MixedReader, vocabulary: Vocabulary | None = None) -> None:
        self.reader, self.vocabulary = reader, vocabulary

    def __getitem__(self, index: int) -> Record | None:
        return None if index == NOTHING else self.reader[index]

    def collate(self, records: list[Record | None]) -> Batch:
        """Make a batch. Sentinels alone make one with a sample in it and no position that counts."""
        some = [record for record in records if record is not None]
        batch = self.reader.collate(some) if some else self.reader.collate([self.reader[0]]).without_loss()
        return batch if self.vocabulary is None else trim_batch(batch, self.vocabulary)[0]


class ReadAhead(DataLoader):
    """A loader whose next batch a thread reads and decodes while the caller computes with this one."""

    def __iter__(self) -> Any:
        batches = super().__iter__()
        with ThreadPoolExecutor(max_workers=1) as thread:
            following = thread.submit(next, batches, None)
            while (batch := following.result()) is not None:
                following = thread.submit(next, batches, None)
                yield batch


class CacheDataModule(pl.LightningDataModule):
    """Batches of a cache.

    Args:
        train: the samples to learn from.
        held_out: the samples to measure on, or None.
        step_samples: samples of an optimiser step on each device: a batch of `train`.
        batch_size: samples a forward pass: a batch of `held_out`.
        seed: seed of the order.
        num_workers: processes that read the cache.
        vocabulary: the tokens of a student that has only some of the teacher's.
    """

    def __init__(
        self,
        train: CacheReader | MixedReader,
        held_out: CacheReader | None,
        *,
        step_samples: int,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        super().__init__()
        self.train, self.held_out, self.vocabulary = train, held_out, vocabulary
        self.step_samples, self.batch_size = step_samples, batch_size
        self.seed, self.num_workers = seed, num_workers
        self._begin = 0, 0
        self._order: EpochPermutation | None = None

    def train_dataloader(self) -> DataLoader:
        rank, world = self._process()
        order = EpochPermutation(
            len(self.train),
            self.seed,
            *self._begin,
            batch_size=self.step_samples,
            rank=rank,
            world=world,
            mixture=self.train if isinstance(self.train, MixedReader) else None,
        )
        self._order = order
        return self._loader(self.train, order, self.step_samples, self.num_workers)

    def val_dataloader(self) -> DataLoader | list:
        if self.held_out is None:
            return []
        return self._loader(self.held_out, self._in_order(len(self.held_out)), self.batch_size)

    def some_held_out(self, count: int) -> DataLoader | list:
        """Return a loader of at most `count` held-out samples, spread over all of them."""
        if self.held_out is None:
            return []
        chosen = sorted(spread(len(self.held_out))[:count].tolist())
        numbers = [number if number == NOTHING else chosen[number] for number in self._in_order(len(chosen))]
        return self._loader(self.held_out, numbers, self.batch_size)

    def _in_order(self, size: int) -> EpochPermutation:
        """Return this process's share of the numbers 0 to `size` - 1, for measuring."""
        rank, world = self._process()
        return EpochPermutation(size, None, batch_size=self.batch_size, rank=rank, world=world)

    def _loader(
        self, reader: CacheReader | MixedReader, order: Sampler[int] | list[int], batch_size: int, num_workers: int = 0
    ) -> DataLoader:
        samples = Samples(reader, self.vocabulary)
        return (DataLoader if num_workers else ReadAhead)(
            samples,
            batch_size=batch_size,
            sampler=order,
            collate_fn=samples.collate,
            num_workers=num_workers,
        )

    def _process(self) -> tuple[int, int]:
        """Return this process's number, and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def state_dict(self) -> dict[str, int]:
        """Return the epoch under way, and the number of its samples seen by all processes together."""
        assert self.trainer is not None
        loop = self.trainer.fit_loop
        # Lightning counts an epoch as `ready` from its start, and as `processed` before the hooks of its end.
        epoch = max(loop.epoch_progress.current.ready - 1, 0)
        batches = loop.epoch_loop.batch_progress.current.ready
        _, world = self._process()
        if batches >= batches_of(len(self.train), self.step_samples, world):
            return {"epoch": epoch + 1, "seen": 0}
        return {"epoch": epoch, "seen": batches * self.step_samples * world}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Resume there. The samples a step of all processes together must be the same, but their number may differ."""
        self._begin = state_dict["epoch"], state_dict["seen"]
        if self._order is not None:  # under fsdp Lightning restores after it has asked for the loader
            self._order.first_epoch, self._order.seen = self._begin
