"""Speed of a disk, measured with a file that is removed at once."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

MOST_BYTES = 256 << 20
"""Largest size of the file."""
_PIECE = 4 << 20
_LONGEST = 4.0
"""Seconds of writing after which a disk counts as slow."""


def time_disk(folder: Path) -> tuple[float, float] | None:
    """Return bytes a second written and read in `folder`, or None if there is no room to try. Raises OSError.

    The file has no name, so that not even a crash leaves it. It takes at most 256 MB and a tenth of the free space.
    """
    pieces = min(MOST_BYTES, shutil.disk_usage(folder).free // 10) // _PIECE
    if not pieces:
        return None
    piece = os.urandom(_PIECE)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        start, written = time.perf_counter(), 0
        while written < pieces and time.perf_counter() - start < _LONGEST:
            file.write(piece)
            written += 1
        os.fsync(file.fileno())
        writing = time.perf_counter() - start
        if hasattr(os, "posix_fadvise"):  # otherwise the read would come from memory, not from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        while file.read(_PIECE):
            pass
        reading = time.perf_counter() - start
    size = written * _PIECE
    return size / writing, size / max(reading, 1e-9)
