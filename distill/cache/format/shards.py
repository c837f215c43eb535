"""A shard's file: records one after the other and where each begins, as a safetensors file of one possible header."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from distill.cache.format.arrays import DamagedRecord
from distill.system.files import open_regular

_HEADER_LIMIT = 512
"""Bytes; the two tensors of a shard take about 180."""


def encode(records: list[bytes], batch_size: int) -> bytes:
    """Return the file of these records, as safetensors would write tensors `offsets` (u64) and `records` (bytes).

    Its metadata says the batch size that the teacher had: another might move a target.
    """
    offsets = np.cumsum([0, *map(len, records)], dtype="<u8")
    return b"".join([_header(len(records), int(offsets[-1]), batch_size), offsets.tobytes(), *records])


def _header(samples: int, size: int, batch_size: int | None) -> bytes:
    offsets_end = 8 * (samples + 1)
    tensors: dict[str, Any] = {} if batch_size is None else {"__metadata__": {"batch_size": str(batch_size)}}
    tensors |= {
        "offsets": {"dtype": "U64", "shape": [samples + 1], "data_offsets": [0, offsets_end]},
        "records": {"dtype": "U8", "shape": [size], "data_offsets": [offsets_end, offsets_end + size]},
    }
    text = json.dumps(tensors, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class ShardFile:
    """The records of one shard, each read when it is asked for. Raises DamagedRecord and OSError.

    Records are read by position, not memory-mapped: the page cache works the same, and a file that is cut short or lies
    on a failing disk is an error here and not the end of the interpreter.
    """

    def __init__(self, path: Path, samples: int) -> None:
        self.samples, self._file = samples, -1
        self._file = open_regular(path)
        self.batch_size: int | None = None
        """Samples of a forward pass of the teacher. None in a shard of format version 1."""
        self._start, self._size = self._read_header()

    def _read_header(self) -> tuple[int, int]:
        """Return where the offsets begin, and the size of all records. A header must be the one we would write."""
        length = os.fstat(self._file).st_size
        start = 8 + int.from_bytes(self._pread(8, 0), "little")
        size = length - start - 8 * (self.samples + 1)
        if start > _HEADER_LIMIT or size < 0:
            raise DamagedRecord("the header of its file does not fit")
        header = self._pread(start, 0)
        if match := re.match(rb'\{"__metadata__":\{"batch_size":"([1-9][0-9]{0,8})"\}', header[8:]):
            self.batch_size = int(match[1])
        if header != _header(self.samples, size, self.batch_size):
            raise DamagedRecord("the header of its file does not fit")
        return start, size

    def record(self, row: int) -> bytes:
        """Return the bytes of one record."""
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
