"""Reading a cache: sample i in constant time and constant memory, and batches of samples with their targets."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from torch.utils.data import Dataset

from distill.cache.format import records, version1
from distill.cache.format.arrays import DamagedRecord
from distill.cache.format.folder import read_journal, read_manifest
from distill.cache.format.head import load_head
from distill.cache.format.part import read_part
from distill.cache.format.records import Record
from distill.cache.format.shards import ShardFile
from distill.cache.format.token_order import load_order
from distill.cache.reading.batches import Batch, collate
from distill.cache.reading.storage import Storage, open_storage
from distill.errors import UserError, did_you_mean
from distill.models.language_model import Head

_ATTEMPTS = 3
NO_LIMITS: Mapping[str, int | None] = MappingProxyType({})


class CacheReader(Dataset[Record]):
    """The samples of one split (`train` or `held_out`) of a finished cache, in a folder or at an fsspec URL.

    Only the manifest is kept in memory (and 40 bytes a shard for a URL), and nothing is kept open: a sample is read
    from its shard, which is opened for that moment only. So memory is the same at any size, and any number of threads,
    workers and processes may read at once.

    Raises UserError if there is no cache, if it is not finished, or if a sample in it is damaged.
    """

    def __init__(
        self, location: Path | str | Storage, split: str, at_most: Mapping[str, int | None] = NO_LIMITS
    ) -> None:
        """Open a cache, or its first samples: `at_most` of each split, by name; None for all."""
        self.storage = open_storage(location) if isinstance(location, (str, Path)) else location
        self.manifest = read_manifest(self.storage.folder)
        self.scheme = self.manifest.make_scheme()
        if split not in self.manifest.splits:
            raise UserError(f"cache {self.storage.name}: no split '{split}'{did_you_mean(split, self.manifest.splits)}")
        counts = {name: _least(count, at_most.get(name)) for name, count in self.manifest.splits.items()}
        self.used = replace(self.manifest, splits=counts)
        """Manifest of the cache that has no more samples than are read of this one."""
        self._numbers = self.manifest.split_range(split)[: counts[split]]
        check_finished(self.storage, self.manifest.shards_with(counts))
        self.order = load_order(self.storage.folder, self.manifest)

    def __len__(self) -> int:
        return len(self._numbers)

    @cached_property
    def teacher_head(self) -> Head | None:
        """The teacher's head beside a cache of hidden states; None for other caches. Raises UserError if it is lost."""
        return load_head(self.storage.folder) if self.manifest.scheme == "hidden" else None

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        sample, storage = self._numbers[index], self.storage
        shard, row = self.manifest.place(sample)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._record(sample, shard, row)
            except (DamagedRecord, OSError) as error:
                # Another process removed a URL's copy just then to make room for its own, or the copy is damaged.
                if attempt < _ATTEMPTS and storage.drop_copy(shard):
                    continue
                raise UserError(
                    f"cache {storage.name}: {self.manifest.shard_file(shard)}, sample {row} cannot be read ({error}): "
                    f"run `distill inspect {storage.name} --verify`"
                ) from None
        raise AssertionError("unreachable")

    def _record(self, sample: int, shard: int, row: int) -> Record:
        manifest = self.manifest
        with ShardFile(self.storage.shard(shard), len(manifest.shard_range(shard))) as file:
            data = file.record(row)
        key, has_documents = manifest.record_key(sample), manifest.version != version1.VERSION
        return self.order.named(
            records.decode(data, manifest.sequence_length, self.scheme, key, with_documents=has_documents)
        )

    def collate(self, records: list[Record]) -> Batch:
        """Join records to one batch."""
        return collate(records)


def _least(count: int, limit: int | None) -> int:
    return count if limit is None else min(count, limit)


def check_finished(storage: Storage, needed: Collection[int]) -> None:
    """Raise UserError if shards that are `needed` are missing."""
    journal, shards = read_journal(storage.folder), len(needed)
    missing = sum(shard not in journal for shard in needed)
    part = read_part(storage.folder)
    if missing and part:
        raise UserError(
            f"cache {storage.name} is not finished: it is part {part.number} of {part.count}: "
            "join the parts with `distill merge PART PART ... --to CACHE`"
        )
    if missing:
        raise UserError(
            f"cache {storage.name} is not finished ({missing} of {shards} shards to go): "
            "run `distill cache-teacher` again, it continues"
        )
