"""A shard's file: records one after the other and where each begins, as a safetensors file of one possible header."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np

from distill.cache.format.arrays import DamagedRecord
from distill.system.files import open_regular

_HEADER_LIMIT = 512
"""Bytes; the two tensors of a shard take about 130."""


def encode(records: list[bytes]) -> bytes:
    """The file of these records, as safetensors would write tensors `offsets` (u64) and `records` (bytes)."""
    offsets = np.cumsum([0, *map(len, records)], dtype="<u8")
    return b"".join([_header(len(records), int(offsets[-1])), offsets.tobytes(), *records])


def _header(samples: int, size: int) -> bytes:
    offsets_end = 8 * (samples + 1)
    tensors = {
        "offsets": {"dtype": "U64", "shape": [samples + 1], "data_offsets": [0, offsets_end]},
        "records": {"dtype": "U8", "shape": [size], "data_offsets": [offsets_end, offsets_end + size]},
    }
    text = json.dumps(tensors, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class ShardFile:
    """The records of one shard, each read when it is asked for. Raises DamagedRecord and OSError.

    Read by position, not memory-mapped: what the page cache does is the same, and a file that is cut short or lies on
    a failing disk is an error here and not the end of the interpreter.
    """

    def __init__(self, path: Path, samples: int) -> None:
        self.samples, self._file = samples, -1
        self._file = open_regular(path)
        self._start, self._size = self._read_header()

    def _read_header(self) -> tuple[int, int]:
        """Where the offsets begin, and the size of all records. The header must be the one that follows from them."""
        length = os.fstat(self._file).st_size
        start = 8 + int.from_bytes(self._pread(8, 0), "little")
        size = length - start - 8 * (self.samples + 1)
        if start > _HEADER_LIMIT or size < 0 or self._pread(start, 0) != _header(self.samples, size):
            raise DamagedRecord("the header of its file does not fit")
        return start, size

    def record(self, row: int) -> bytes:
        """The bytes of one record."""
        assert 0 <= row < self.samples
        first, last = struct.unpack("<QQ", self._pread(16, self._start + 8 * row))
        is_whole = (row > 0 or first == 0) and (row < self.samples - 1 or last == self._size)
        if not (first < last <= self._size and is_whole):
            raise DamagedRecord("its place in the file is not possible")
        return self._pread(last - first, self._start + 8 * (self.samples + 1) + first)

    def _pread(self, size: int, offset: int) -> bytes:
        data = os.pread(self._file, size, offset)
        if len(data) != size:
            raise DamagedRecord("its file is cut off")
        return data

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
