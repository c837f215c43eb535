"""Files that survive a power cut, written whole or not at all; folders with one writer; reading without trust."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

from distill.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks, so nothing keeps two writers apart there
    fcntl = None  # type: ignore[assignment]

TEMPORARY = ".tmp"
"""Ending of the name of a file that is not finished."""

MOST_BYTES = 2**28
"""Limit of a file that is read at once: a report's figures take some MB, the largest tokenizers 35."""

_BINARY = getattr(os, "O_BINARY", 0)  # Windows would write two bytes for every end of line


def write_durably(path: Path, content: bytes) -> None:
    """Write a file so that after a power cut there is either all of it or none: temporary name, sync, rename, sync."""
    make_folder(path.parent)
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.unlink(missing_ok=True)  # never through a link that someone left there
    try:
        _write_new(temporary, content)
        os.replace(temporary, path)
    except OSError:
        # On a full disk the remains would take the room that the next attempt needs.
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _write_new(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
    try:
        _write_all(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_durably(path: Path, line: bytes) -> None:
    """Append a line to a file, even if a killed process left half a line at its end.

    After a power cut the end of `line` may be missing. After an error nothing of it is there.
    """
    is_new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _BINARY, 0o666)
    try:
        # The lock comes before the look at the file's end: without it, the end may be the middle of another process's
        # line, which an error here would cut off too.
        _lock(descriptor, wait=True)
        size = os.fstat(descriptor).st_size
        try:
            _write_all(descriptor, line if _ends_a_line(descriptor, size) else b"\n" + line)
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
    if is_new:
        sync_folder(path.parent)


def append_bytes(path: Path, at: int, content: bytes, sync: bool) -> None:
    """Write at a place of a file, which is made if missing, and cut off what followed there.

    After an error nothing of `content` is there.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | _BINARY, 0o666)
    try:
        os.ftruncate(descriptor, at)
        os.lseek(descriptor, at, os.SEEK_SET)
        try:
            _write_all(descriptor, content)
            if sync:
                os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, at)
            raise
    finally:
        os.close(descriptor)


def _ends_a_line(descriptor: int, size: int) -> bool:
    if size == 0:
        return True
    os.lseek(descriptor, size - 1, os.SEEK_SET)
    return os.read(descriptor, 1) == b"\n"


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keep other writers out of a folder, which is made if missing. A process that dies leaves no lock behind.

    Raises UserError while another process holds it, and OSError if the folder cannot be made.
    """
    make_folder(folder)
    # The folder itself is locked. A lock file (filelock) would be one file more in a cache, would travel with a folder
    # that is renamed when it is complete, and could not be made beside a folder that is a mount point.
    descriptor = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if descriptor is not None:
            _held.add(descriptor)
        if descriptor is not None and not _lock(descriptor, wait=False):
            raise UserError(f"{folder}: another process is writing here: wait for it, or stop it")
        yield
    finally:
        if descriptor in _held:
            _held.discard(descriptor)
            os.close(descriptor)


_held: set[int] = set()
"""Descriptors of locked folders."""


def _let_go() -> None:
    """Close the locks that a forked process has from its parent: a lock lasts as long as anybody has it open.

    Otherwise a child that outlives a killed parent by some seconds would keep the next start out.
    """
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _lock(descriptor: int, wait: bool) -> bool:
    """Lock an open file or folder until it is closed. Returns False if another process has the lock."""
    try:
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _write_all(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def make_folder(folder: Path) -> None:
    """Make the folder and those above it, and sync their names."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_file(path: Path) -> None:
    """Bring the content of a file that others wrote to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename or a new name in `folder` survive a power cut."""
    if os.name == "nt":  # where folders cannot be opened, and renames are journaled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_inside(path: Path, folder: Path) -> bool:
    """Return whether no link leads from `folder` out to `path`.

    A download from a hub is a folder of links to `blobs`, beside the `snapshots` that it lies in: these are inside.
    """
    target, root = path.resolve(), folder.resolve()
    stores = [parent.with_name("blobs") for parent in root.parents if parent.name == "snapshots"]
    return any(target.is_relative_to(place) for place in (root, *stores))


def open_regular(path: Path) -> int:
    """Open a file for reading, and return its descriptor. Raises OSError if it is no plain file.

    A pipe, for example, would never answer.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return descriptor


def read_bounded(path: Path, limit: int = MOST_BYTES) -> bytes:
    """Return the content of a file. Raises OSError if it is no plain file or longer than `limit` bytes."""
    with open(open_regular(path), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"longer than {limit:,} bytes", str(path))
    return content


def sha256_of(path: Path) -> str:
    """Return the sha256 (hex) of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with open(open_regular(path), "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def without_folders(path: str) -> str:
    """Return the last part alone of an absolute path or one in a home folder; any other text is returned unchanged.

    This is for texts that others read: the folders reveal a machine and its user, and lead nowhere elsewhere. Windows'
    paths are recognised too.
    """
    is_absolute = path.startswith(("/", "~", "\\\\", "file:")) or PureWindowsPath(path).is_absolute()
    return last_part(path) if is_absolute else path


def names_only(value: Any) -> Any:
    """Return a value of JSON with `without_folders` applied to every text in it."""
    if isinstance(value, dict):
        return {key: names_only(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [names_only(each) for each in value]
    return without_folders(value) if isinstance(value, str) else value


def last_part(path: str) -> str:
    """Return the name at the end of a path, with either system's separators; a path without one stays unchanged."""
    return PureWindowsPath(path).name or path
