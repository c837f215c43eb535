"""Finished batches of a shard in flight: a side file beside the shards, which goes when its shard is written."""

from __future__ import annotations

import os
import struct
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from distill.cache.format.manifest import Manifest
from distill.system.files import append_bytes, make_folder, open_regular

SUFFIX = ".batches"
SYNC_SECONDS = 20.0
"""Longest time that finished batches wait for a sync: a kill takes none of them, a power cut those since the last."""

_HEAD = struct.Struct("<III")
"""A batch's crc32 of what follows, batch size (its shard may end with a smaller batch), and bytes of what follows."""


@dataclass
class InFlight:
    """The records of a shard's finished batches, all of one batch size, in memory and in the side file."""

    path: Path
    numbers: range
    """The shard's samples, by their numbers in the cache."""
    first_key: int
    """Record key of the first sample, from which checksums start, so that another shard's file does not check."""
    batch_size: int
    encoded: list[bytes]
    size: int = 0
    """Bytes of the side file that are whole. What follows was cut off by a kill."""
    _synced: float = field(default_factory=time.monotonic)

    @classmethod
    def empty(cls, folder: Path, manifest: Manifest, shard: int, batch_size: int) -> InFlight:
        """Return a shard in flight without a batch."""
        numbers = manifest.shard_range(shard)
        path = side_file(folder, manifest, shard)
        return cls(path, numbers, manifest.record_key(numbers.start), batch_size, [])

    def append(self, batch: list[bytes]) -> None:
        """Add the next batch's records. Raises OSError: then the file is as before."""
        sizes = struct.pack(f"<{len(batch)}I", *map(len, batch))
        body = b"".join([sizes, *batch])
        head = struct.pack("<II", self.batch_size, len(body))
        content = struct.pack("<I", zlib.crc32(head + body, self.first_key)) + head + body
        make_folder(self.path.parent)
        if self.path.is_symlink():  # nothing outside the cache is written
            self.path.unlink()
        is_late = time.monotonic() - self._synced >= SYNC_SECONDS
        append_bytes(self.path, self.size, content, sync=is_late)
        if is_late:
            self._synced = time.monotonic()
        self.size += len(content)
        self.encoded += batch


def read(folder: Path, manifest: Manifest, shard: int) -> InFlight:
    """Return the finished batches of a shard, of the batch size that they have; 0 if there is none.

    Batches count up to the first that is not whole, not this cache's, or not of the first one's batch size.
    """
    found = InFlight.empty(folder, manifest, shard, 0)
    if found.path.is_symlink() or found.path.parent.is_symlink():
        return found
    try:
        with open(open_regular(found.path), "rb") as file:
            while len(head := file.read(_HEAD.size)) == _HEAD.size:
                crc32, batch_size, length = _HEAD.unpack(head)
                count = min(batch_size, len(found.numbers) - len(found.encoded))
                # The last batch of a shard is never here: with it the shard is whole.
                is_last = len(found.encoded) + count == len(found.numbers)
                if is_last or batch_size == 0 or batch_size != (found.batch_size or batch_size):
                    break
                if not 4 * count <= length <= os.fstat(file.fileno()).st_size:  # before so much memory is taken
                    break
                body = file.read(length)
                sizes = struct.unpack_from(f"<{count}I", body) if len(body) == length else ()
                if 4 * count + sum(sizes) != length or zlib.crc32(head[4:] + body, found.first_key) != crc32:
                    break
                found.batch_size, start = batch_size, 4 * count
                for size in sizes:
                    found.encoded.append(body[start : start + size])
                    start += size
                found.size = file.tell()
    except OSError:  # no such file, or not a plain one
        pass
    return found


def side_file(folder: Path, manifest: Manifest, shard: int) -> Path:
    """Return the path of a shard's side file."""
    return (folder / manifest.shard_file(shard)).with_suffix(SUFFIX)
