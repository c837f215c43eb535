"""The writer of a cache: shard by shard, each durable before the next, so that a second start continues."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from distill.cache.format import journal, records
from distill.cache.format.folder import (
    JOURNAL,
    MANIFEST,
    PART,
    SHARDS,
    TOKEN_ORDER,
    TOKENIZER,
    JournalEntry,
    Manifest,
    differences,
    read_journal,
    read_manifest,
    seal,
)
from distill.cache.format.head import HEAD
from distill.cache.format.leftovers import SHARD_NAME, is_leftover, remove, remove_leftovers
from distill.cache.format.records import Record
from distill.cache.format.shards import encode
from distill.cache.format.token_order import TokenOrder, load_order
from distill.errors import UserError
from distill.system.files import sync_folder, write_durably
from distill.system.locks import cannot_write


class CacheWriter:
    """A writer that adds shards to a cache folder, which it makes or, if it is the same cache, continues.

    `batch_size` is the number of samples in a forward pass of the teacher. A shard that existed before and must be made
    again keeps its batch size, because another might move a target.

    Raises UserError if the folder holds another cache (unless `overwrite`), is not empty, is damaged, or cannot be
    written.
    """

    def __init__(self, folder: Path, manifest: Manifest, overwrite: bool = False, batch_size: int = 1) -> None:
        self.folder, self._batch_size = folder, batch_size
        try:
            self.manifest = self._open(manifest, overwrite)
        except OSError as error:
            raise cannot_write(folder, error) from None
        self.scheme = self.manifest.make_scheme()
        self._left = set(self.missing())

    def _open(self, manifest: Manifest, overwrite: bool) -> Manifest:
        path = self.folder / MANIFEST
        if path.exists():
            # Faults of the old manifest do not matter, since it goes.
            if overwrite and not self._holds(manifest):
                _clear(self.folder)
                write_durably(path, manifest.to_json().encode())
            else:
                self._check_same(manifest)
        else:
            if self.folder.exists() and not all(is_leftover(child.name) for child in self.folder.iterdir()):
                raise UserError(
                    f"{self.folder}: not a cache, and not empty: point --cache.dir to a new or empty folder"
                )
            write_durably(path, manifest.to_json().encode())
        remove_leftovers(self.folder)
        found = read_manifest(self.folder)
        self._dropped = self._heal_journal(found)
        return found

    def _holds(self, manifest: Manifest) -> bool:
        """Tell whether the folder holds a cache of this manifest, in the format that is written."""
        try:
            found = read_manifest(self.folder)
        except UserError:
            return False
        return found.version == manifest.version and not differences(manifest, found)

    def _check_same(self, manifest: Manifest) -> None:
        found = read_manifest(self.folder)
        different = differences(manifest, found)
        if found.version != manifest.version and not different:
            raise UserError(
                f"cache {self.folder} was begun by an earlier release, in format version {found.version}, which this "
                "one reads but does not write: finish it with that release, or begin anew with --cache.overwrite true"
            )
        if different:
            raise UserError(
                f"cache {self.folder} was made from something else ({'; '.join(different)}): "
                "point --cache.dir elsewhere, or pass --cache.overwrite true"
            )

    def _heal_journal(self, manifest: Manifest) -> dict[int, JournalEntry]:
        """Drop a torn line of a killed writer from the journal, and entries whose shard is gone; return these."""
        found = journal.read_whole(self.folder, manifest)
        there = {shard: entry for shard, entry in found.entries.items() if self._has(entry)}
        gone = {shard: entry.dropped() for shard, entry in found.entries.items() if shard not in there}
        journal.rewrite(self.folder, manifest, {**found.dropped, **gone, **there})
        return {**found.dropped, **gone}

    def batch_size(self, shard: int) -> int:
        """Return the number of samples of a shard that the teacher reads in a forward pass."""
        return self._dropped[shard].batch_size if shard in self._dropped else self._batch_size

    def _has(self, entry: JournalEntry) -> bool:
        path = self.folder / entry.file
        return path.is_file() and path.stat().st_size == entry.bytes

    @cached_property
    def order(self) -> TokenOrder:
        """The order of the tokens, which lies beside the shards before the first of them is written."""
        return load_order(self.folder, self.manifest)

    def missing(self) -> list[int]:
        """Return the shards that are not finished, in order."""
        done = read_journal(self.folder, self.manifest)
        return [shard for shard in range(self.manifest.shards) if shard not in done or not self._has(done[shard])]

    def write(self, shard: int, samples: list[Record]) -> JournalEntry:
        """Write one shard: temporary name, sync, rename, then its journal line. The last one seals the journal.

        Raises UserError if the disk is full or refuses the file: then nothing of the shard is there.
        """
        numbers = self.manifest.shard_range(shard)
        content = encode(
            [
                records.encode(self.order.ranked(record), self.scheme, self.manifest.record_key(number))
                for number, record in zip(numbers, samples, strict=True)
            ],
            self.batch_size(shard),
        )
        entry = JournalEntry.of(self.manifest.shard_file(shard), content, samples, self.batch_size(shard))
        try:
            write_durably(self.folder / entry.file, content)
            journal.append(self.folder, self.manifest, entry)
            self._left.discard(shard)
            if not self._left:
                seal(self.folder)
        except OSError as error:
            raise cannot_write(self.folder, error, len(content) * len(self._left)) from None
        return entry


def _clear(folder: Path) -> None:
    """Remove a cache except for its manifest, which names the folder's owner until the new one is in its place."""
    (folder / JOURNAL).unlink(missing_ok=True)
    sync_folder(folder)
    remove(folder / SHARDS, lambda name: SHARD_NAME.fullmatch(name) is not None)
    remove(folder, lambda name: name in (PART, TOKEN_ORDER, TOKENIZER, HEAD))
