"""Failures that no other place foresaw, as one line: full disks and memory by name, all others with a traceback."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from distill.system.memory import is_out_of_memory

_FULL = (errno.ENOSPC, errno.EDQUOT)
_OF_THE_DISK = (*_FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENAMETOOLONG, errno.ENOTDIR)
_FULL_TEXTS = ("no space left on device", "disk quota exceeded")
_LITTLE = 2**24
"""Free bytes below which a folder is said to be full, where an error does not name a file."""


def explain(error: BaseException, run: Path | None = None) -> str | None:
    """Return the line for an exception of a disk or of memory.

    A disk's has the folder, the reason, and the variable that moves the folder. Returns None for any other exception.
    `run` is the command's run folder, where it is known.
    """
    for cause in _causes(error):
        if isinstance(cause, OSError) and isinstance(cause.filename, str | os.PathLike) and cause.strerror:
            path = Path(os.fspath(cause.filename))
            variable = "" if run and path.is_relative_to(run) else _variable(path)
            if variable or cause.errno in _OF_THE_DISK:
                return _line(str(path), cause.strerror, variable, is_full=cause.errno in _FULL)
        if getattr(cause, "errno", None) in _FULL or any(text in str(cause).lower() for text in _FULL_TEXTS):
            places = {"": run or Path.cwd(), **_caches()}
            variable = next((name for name, place in places.items() if _is_full(place)), "")
            return _line(str(places[variable]), "", variable, is_full=True)
        if isinstance(cause, MemoryError) or ("torch" in sys.modules and is_out_of_memory(cause)):
            return (
                "out of memory: free the device from other programs, or lower the batch sizes and "
                "corpus.sequence_length (`distill plan` says what fits); what was finished before is kept"
            )
    return None


def keep_traceback(error: BaseException, run: Path | None = None) -> Path | None:
    """Write the full traceback into the run folder, or else the folder of temporary files, and return its path."""
    text = "".join(traceback.format_exception(error))
    for folder in ([] if run is None else [run]) + [Path(tempfile.gettempdir())]:
        path = folder / f"traceback-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
        try:
            with open(path, "x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return path
        except OSError:
            continue
    return None


def _line(place: str, reason: str, variable: str, *, is_full: bool) -> str:
    what = "disk full" if is_full else f"cannot be used ({reason})"
    remedy = "free room there" if is_full else "mend that"
    move = f", or let {variable} name a folder elsewhere" if variable else ""
    return f"{place}: {what}: {remedy}{move}, then run the same command again; what was finished before is kept"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _caches() -> dict[str, Path]:
    """Return the folders that libraries write to, by the variable that moves each; the inner ones first."""
    home = Path(os.environ.get("HOME") or os.path.expanduser("~"))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    hub = Path(os.environ.get("HF_HOME") or cache / "huggingface")
    return {
        "HF_DATASETS_CACHE": Path(os.environ.get("HF_DATASETS_CACHE") or hub / "datasets"),
        "HF_HUB_CACHE": Path(os.environ.get("HF_HUB_CACHE") or hub / "hub"),
        "HF_HOME": hub,
        "XDG_CACHE_HOME": cache,
        "TMPDIR": Path(os.environ.get("TMPDIR") or "/tmp"),
    }


def _variable(path: Path) -> str:
    """Return the variable whose folder this is, or lies above or below; an empty text for all other paths.

    A folder above is one that could not be made on the way down.
    """
    for name, folder in _caches().items():
        if path.is_relative_to(folder) or folder.is_relative_to(path):
            # HF_HOME moves all of its parts at once, unless one was placed apart.
            return name if name in os.environ or not name.startswith("HF_") else "HF_HOME"
    return ""


def _is_full(folder: Path) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        found = os.statvfs(folder)
    except (OSError, AttributeError):  # Windows has no statvfs
        return False
    return found.f_bavail * found.f_frsize < _LITTLE
