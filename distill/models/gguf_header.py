"""A GGUF file's header, read fast and once: its vocabulary is a hundred thousand strings, each of several slices."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Iterator
from typing import Any

_kept: dict[tuple[str, int, int, int], Any] = {}
"""The last header that was read, by its file's place, inode, size and time."""


@functools.cache
def plain_reader() -> Any:
    """Return gguf's reader on a plain array. Slices of numpy's class for mapped files take four times as long."""
    import gguf
    import numpy as np

    class PlainReader(gguf.GGUFReader):
        def __setattr__(self, name: str, value: Any) -> None:
            # The array that the reader slices; it keeps the file mapped.
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    return PlainReader


@contextlib.contextmanager
def reading_gguf(file: str | None) -> Iterator[None]:
    """Let transformers read a GGUF file fast inside, and take a header that it has read already from memory.

    It reads the header for the configuration, and again for the tokenizer; a file that has changed is read anew.
    Without a `file` nothing changes.
    """
    if file is None:
        yield
        return
    import gguf
    from transformers import modeling_gguf_pytorch_utils

    library: Any = gguf
    theirs: Any = modeling_gguf_pytorch_utils
    load, reader = theirs.load_gguf_checkpoint, library.GGUFReader

    def load_once(path: str, return_tensors: bool = False, *args: Any, **options: Any) -> Any:
        if return_tensors:
            return load(path, return_tensors, *args, **options)
        found = os.stat(path)
        key = os.path.realpath(path), found.st_ino, found.st_size, found.st_mtime_ns
        if key not in _kept:
            header = load(path, return_tensors, *args, **options)
            _kept.clear()
            _kept[key] = header
        return copy.deepcopy(_kept[key])  # whoever reads it may change it

    theirs.load_gguf_checkpoint, library.GGUFReader = load_once, plain_reader()
    try:
        yield
    finally:
        theirs.load_gguf_checkpoint, library.GGUFReader = load, reader
