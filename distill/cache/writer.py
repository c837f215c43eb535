"""Writing a cache: shard by shard, each durable before the next, so that a second start continues."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from distill.cache.format import (
    JOURNAL,
    MANIFEST,
    JournalEntry,
    Manifest,
    differences,
    read_journal,
    read_manifest,
    sha256_of,
    shard_file,
    sync_folder,
    write_durably,
)
from distill.cache.records import Record, pack
from distill.errors import UserError


class CacheWriter:
    """Adds shards to a cache folder, which it makes or, if it is the same cache, continues.

    Raises UserError when the folder holds another cache (unless `overwrite`), is not empty, or cannot be written.
    """

    def __init__(self, folder: Path, manifest: Manifest, overwrite: bool = False) -> None:
        self.folder, self.manifest = folder, manifest
        self.scheme = manifest.make_scheme()
        try:
            self._open(overwrite)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot write the cache here ({error.strerror}): point --cache.dir elsewhere"
            ) from None

    def _open(self, overwrite: bool) -> None:
        if (self.folder / MANIFEST).exists():
            # What is wrong with the old manifest is of no interest to someone who wants it gone.
            if overwrite and (not self._readable() or differences(self.manifest, read_manifest(self.folder))):
                shutil.rmtree(self.folder)
            else:
                self._check_same()
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder}: not a cache, and not empty: point --cache.dir to a new or empty folder")
        if not (self.folder / MANIFEST).exists():
            write_durably(self.folder / MANIFEST, self.manifest.to_json().encode())
        self._cut_torn_line()

    def _readable(self) -> bool:
        try:
            read_manifest(self.folder)
        except UserError:
            return False
        return True

    def _check_same(self) -> None:
        different = differences(self.manifest, read_manifest(self.folder))
        if different:
            raise UserError(
                f"cache {self.folder} was made from something else ({'; '.join(different)}): "
                "point --cache.dir elsewhere, or pass --cache.overwrite true"
            )

    def _cut_torn_line(self) -> None:
        """A journal line that a kill or a power cut left without its end is taken away: its shard is made again."""
        journal = self.folder / JOURNAL
        if not journal.exists():
            return
        content = journal.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) != len(content):
            write_durably(journal, whole)

    def missing(self) -> list[int]:
        """Shards that are not finished, in order."""
        done = read_journal(self.folder)
        return [
            shard
            for shard in range(self.manifest.shards)
            if shard not in done or not (self.folder / shard_file(shard)).exists()
        ]

    def write(self, shard: int, records: list[Record]) -> JournalEntry:
        """Write one shard: temporary name, sync, rename, then its journal line."""
        assert len(records) == len(self.manifest.shard_range(shard))
        packed = [pack(record, self.scheme) for record in records]
        tensors: dict[str, np.ndarray] = {
            "offsets": np.cumsum([0, *map(len, packed)], dtype=np.uint64),
            "records": np.frombuffer(b"".join(packed), dtype=np.uint8),
        }
        path = self.folder / shard_file(shard)
        write_durably(path, save(tensors))
        entry = JournalEntry(
            shard=shard,
            file=shard_file(shard),
            bytes=path.stat().st_size,
            sha256=sha256_of(path),
            samples=len(records),
            positions=sum(int(record.loss_mask_L.sum()) for record in records),
            entries=sum(record.targets.entries for record in records),
        )
        self._journal(entry)
        return entry

    def _journal(self, entry: JournalEntry) -> None:
        journal = self.folder / JOURNAL
        with journal.open("ab") as file:
            file.write(json.dumps(entry.__dict__, sort_keys=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.folder)
