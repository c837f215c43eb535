"""Text files of a corpus, plain or compressed, with limits: a small file may unpack to anything."""

from __future__ import annotations

import gzip
import io
import lzma
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from distill.errors import UserError
from distill.system.units import size

COMPRESSIONS = (".gz", ".zst", ".xz")
GZIP_RATIO = 200
"""Largest growth of a compressed file. Prose grows 3 times, rows of equal keys 20 times, zeros 1,030 times."""
GZIP_FREE_BYTES = 64 << 20
"""Size to which any compressed file may grow."""
LONGEST_LINE = 256 << 20
"""Characters of a line. A document has 32 MiB at most, and a line may hold more than the document."""


def open_text(path: Path) -> TextIO:
    """Open a file as UTF-8 text. Reading raises UserError for a file that unpacks to more than any text."""
    if path.suffix.lower() not in COMPRESSIONS:
        return open(path, encoding="utf-8-sig")
    most = GZIP_FREE_BYTES + GZIP_RATIO * path.stat().st_size
    return io.TextIOWrapper(io.BufferedReader(_Bounded(path, most)), encoding="utf-8-sig")


def lines(file: TextIO, label: str) -> Iterator[str]:
    """Yield the rest of a file line by line. Raises UserError for a line that no document could need."""
    while line := file.readline(LONGEST_LINE + 1):
        if len(line) > LONGEST_LINE:
            raise UserError(f"{label}: a line of more than {LONGEST_LINE >> 20} Mi characters: one row a line")
        yield line


def _unpacked(path: Path) -> Any:
    kind = path.suffix.lower()
    if kind == ".gz":
        return gzip.open(path)
    if kind == ".xz":
        return lzma.open(path)
    return pa.input_stream(str(path), compression="zstd")


class _Bounded(io.RawIOBase):
    """Content of a compressed file, up to `most` bytes."""

    def __init__(self, path: Path, most: int) -> None:
        self._path, self._most, self._file, self._taken = path, most, _unpacked(path), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go back to the beginning, or stay."""
        if (offset, whence) == (0, os.SEEK_SET):
            self._file.close()
            self._file, self._taken = _unpacked(self._path), 0
        elif whence != os.SEEK_CUR or offset:
            raise io.UnsupportedOperation("only the beginning can be gone back to")
        return self._taken

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._taken += len(data)
        if self._taken > self._most:
            raise UserError(
                f"{self._path}: grows to more than {size(self._most)}, {GZIP_RATIO} times its size, as no text does: "
                "decompress it yourself if you trust it"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
