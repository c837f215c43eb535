"""One writer of a cache at a time, and what a write that fails means to the person."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from distill.errors import UserError
from distill.files import make_folder

try:
    import fcntl
except ImportError:  # Windows has no such locks: there, nothing keeps two writers apart
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keep other writers out of a folder, which is made; a process that dies leaves no lock behind.

    Raises UserError while another process holds it.
    """
    try:
        make_folder(folder)
        descriptor = os.open(folder, os.O_RDONLY) if fcntl else None
    except OSError as error:
        raise cannot_write(folder, error) from None
    try:
        if descriptor is not None:
            _lock(descriptor, folder)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another process is writing here: wait for it, or stop it") from None
    except OSError:
        return  # a file system without locks


def cannot_write(folder: Path, error: OSError, needed: int | None = None) -> UserError:
    """What a failed write means to the person; `needed` is about how many bytes are still to come."""
    reason = error.strerror or str(error)
    again = "then run the same command again"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        room = f"about {needed / 1e6:,.1f} MB" if needed else "room"
        return UserError(
            f"{folder}: disk full ({reason}); everything finished so far is kept: free {room}, "
            f"or move the folder and point --cache.dir to it, {again}"
        )
    return UserError(
        f"{folder}: cannot write the cache here ({reason}); what was finished before is kept: "
        f"mend that, or point --cache.dir elsewhere, {again}"
    )
