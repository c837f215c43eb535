"""Arrays of whole numbers as bytes: pcodec for the numbers, LEB128 for sizes, nothing taken on a stranger's word."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from pcodec import ChunkConfig, PagingSpec, wrapped

_LEVEL = 8
_FILE = wrapped.FileCompressor()
_HEADER = _FILE.write_header()
"""pcodec's file header: the version of its format. It is part of the cache's format, so it is not stored again."""

_NUMPY = {"u16": np.uint16, "u32": np.uint32, "i32": np.int32}


class DamagedRecord(Exception):
    """The bytes are not a record: cut off, or changed after they were written."""


def compress(numbers: NDArray) -> bytes:
    """Compress one array. An empty one takes no bytes."""
    if not len(numbers):
        return b""
    # One page, however long: by itself pcodec begins a new one after 2^18 numbers.
    config = ChunkConfig(compression_level=_LEVEL, paging_spec=PagingSpec.exact_page_sizes([len(numbers)]))
    chunk = _FILE.chunk_compressor(np.ascontiguousarray(numbers), config)
    return chunk.write_meta() + chunk.write_page(0)


def decompress(data: bytes, count: int, dtype: str) -> NDArray:
    """Return the array of `count` numbers (dtype in pcodec's names: u16, u32, i32) that `compress` made.

    Raises DamagedRecord if the bytes hold another number of them.
    """
    values = np.empty(count, dtype=_NUMPY[dtype])
    if not count:
        if data:
            raise DamagedRecord("bytes where no number is")
        return values
    try:
        decompressor, _ = wrapped.FileDecompressor.new(_HEADER)
        chunk, start = decompressor.chunk_decompressor(data, dtype)
        progress, _ = chunk.read_page_into(data[start:], count, values)
    except RuntimeError as error:
        raise DamagedRecord(str(error)) from None
    if progress.n_processed != count or not progress.finished:
        raise DamagedRecord(f"{progress.n_processed} numbers where {count} were expected")
    return values


def write_sizes(sizes: Iterable[int]) -> bytes:
    """Write non-negative whole numbers in LEB128: seven bits a byte, the eighth says that another byte follows."""
    out = bytearray()
    for size in sizes:
        while size >= 0x80:
            out.append(size & 0x7F | 0x80)
            size >>= 7
        out.append(size)
    return bytes(out)


def read_sizes(data: bytes, start: int, count: int) -> tuple[list[int], int]:
    """Return `count` numbers from `start`, and the place after them. Raises DamagedRecord if the data end before."""
    sizes = []
    for _ in range(count):
        size = shift = 0
        while True:
            if start >= len(data) or shift > 56:
                raise DamagedRecord("a size is cut off")
            byte = data[start]
            size |= (byte & 0x7F) << shift
            start, shift = start + 1, shift + 7
            if byte < 0x80:
                break
        sizes.append(size)
    return sizes, start
