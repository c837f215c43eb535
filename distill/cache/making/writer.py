"""The writer of a cache: batch by batch into a side file, shard by shard into the cache, so that a start continues."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from distill.cache.format import in_flight, journal, records
from distill.cache.format.arrays import DamagedRecord
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
from distill.cache.format.in_flight import InFlight
from distill.cache.format.leftovers import SHARD_NAME, SIDE_NAME, is_leftover, remove, remove_leftovers
from distill.cache.format.records import Record
from distill.cache.format.shards import encode
from distill.cache.format.token_order import TokenOrder, load_order
from distill.cache.making.growing import grow, is_same, joined
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
        self._most = manifest.samples
        self._left_in_flight: dict[int, tuple[InFlight, list[Record]]] = {}
        self._in_flight: tuple[int, InFlight, list[Record]] | None = None
        try:
            self._remove_side_files()
        except OSError as error:
            raise cannot_write(folder, error) from None

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
        """Let the same cache grow, if it has fewer samples. Raises UserError for another one."""
        found = read_manifest(self.folder)
        if found.version == manifest.version and is_same(manifest, found) and joined(manifest, found) == manifest:
            if manifest.splits != found.splits:
                grow(self.folder, found, manifest)
            return
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
        """Return the number of samples of a shard that the teacher reads in a forward pass.

        A shard that was begun, or made once before, keeps its own; after `halve` none has more than the half.
        """
        recorded = self._dropped[shard].batch_size if shard in self._dropped else self._batch_size
        return min(self._found(shard)[0].batch_size or recorded, self._most)

    def halve(self, batch_size: int) -> int:
        """Let no shard have more than half of a batch size from here on; return the half."""
        self._most = -(-batch_size // 2)
        return self._most

    def begun(self, shard: int) -> int:
        """Return the number of samples of a shard that an earlier start left finished, at its batch size."""
        flight, samples = self._found(shard)
        return len(samples) if flight.batch_size == self.batch_size(shard) else 0

    def _found(self, shard: int) -> tuple[InFlight, list[Record]]:
        """Return the finished batches of a shard that an earlier start left, as bytes and as records."""
        if shard not in self._left_in_flight:
            flight, samples = in_flight.read(self.folder, self.manifest, shard), []
            try:
                for number, data in zip(flight.numbers, flight.encoded, strict=False):
                    key = self.manifest.record_key(number)
                    record = records.decode(data, self.manifest.sequence_length, self.scheme, key)
                    samples.append(self.order.named(record))
            except DamagedRecord:  # checksums of a hostile file
                flight, samples = InFlight.empty(self.folder, self.manifest, shard, 0), []
            self._left_in_flight[shard] = flight, samples
        return self._left_in_flight[shard]

    def _remove_side_files(self) -> None:
        """Remove the side files of finished shards."""
        remove(
            self.folder / SHARDS,
            lambda name: (
                SIDE_NAME.fullmatch(name) is not None
                and self.manifest.shard_of_file(f"{SHARDS}/{Path(name).stem}.safetensors") not in self._left
            ),
        )

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

    def add(self, shard: int, batch: list[Record], batch_size: int) -> JournalEntry | None:
        """Keep a shard's next batch: in its side file, or, with its last batch, as a shard with its journal line.

        Batches of a shard come in order and have one size, but for the last one. Another size begins the shard anew.
        Raises UserError if the disk is full or refuses the file: then the batches before are kept.
        """
        flight, samples = self._continue(shard, batch_size)
        encoded = self._encoded(shard, batch, len(samples))
        samples += batch
        if len(samples) == len(flight.numbers):
            self._in_flight = None
            return self._finish(shard, flight.encoded + encoded, samples, batch_size)
        try:
            flight.append(encoded)
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        return None

    def write(self, shard: int, samples: list[Record]) -> JournalEntry:
        """Write one shard at once. Raises UserError as `add` does: then nothing of the shard is there."""
        return self._finish(shard, self._encoded(shard, samples), samples, self.batch_size(shard))

    def _encoded(self, shard: int, samples: list[Record], start: int = 0) -> list[bytes]:
        """Return samples of a shard, from its sample `start` on, as bytes."""
        numbers = self.manifest.shard_range(shard)[start : start + len(samples)]
        return [
            records.encode(self.order.ranked(record), self.scheme, self.manifest.record_key(number))
            for number, record in zip(numbers, samples, strict=True)
        ]

    def _continue(self, shard: int, batch_size: int) -> tuple[InFlight, list[Record]]:
        """Return the shard's finished batches at this size, to which the next one is added."""
        now = self._in_flight
        if now is None or now[0] != shard or now[1].batch_size != batch_size:
            flight, samples = self._found(shard)
            # From here on, only the batch size is asked for.
            self._left_in_flight[shard] = InFlight.empty(self.folder, self.manifest, shard, flight.batch_size), []
            if flight.batch_size != batch_size:
                flight, samples = InFlight.empty(self.folder, self.manifest, shard, batch_size), []
            now = self._in_flight = shard, flight, samples
        return now[1:]

    def _finish(self, shard: int, encoded: list[bytes], samples: list[Record], batch_size: int) -> JournalEntry:
        """Write a shard's file: temporary name, sync, rename, then its journal line. The last one seals the journal."""
        content = encode(encoded, batch_size)
        entry = JournalEntry.of(self.manifest.shard_file(shard), content, samples, batch_size)
        try:
            write_durably(self.folder / entry.file, content)
            journal.append(self.folder, self.manifest, entry)
            in_flight.side_file(self.folder, self.manifest, shard).unlink(missing_ok=True)
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
    remove(folder / SHARDS, lambda name: bool(SHARD_NAME.fullmatch(name) or SIDE_NAME.fullmatch(name)))
    remove(folder, lambda name: name in (PART, TOKEN_ORDER, TOKENIZER, HEAD))
