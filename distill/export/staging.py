"""A folder that is complete or absent: it grows beside its name and gets it when everything in it is done."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from distill.errors import UserError
from distill.system.files import sole_writer, sync_folder


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `folder` when the body of the `with` ends, and goes when it raises.

    A process that dies in between leaves it under its other name, where the next one removes it. Raises UserError for
    a `folder` that has something in it, before and after, and while another process fills it.
    """
    _refuse(folder)
    new = folder.with_name(f".{folder.name}.new")
    with sole_writer(new):
        try:
            _remove_content(new)  # of a process that died
            yield new
            _settle(new)
            _refuse(folder)
            if folder.exists():
                folder.rmdir()
            new.rename(folder)
            sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise


def _refuse(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give the name of a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty, and an export replaces nothing: give another --to, or remove it")


def _remove_content(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _settle(folder: Path) -> None:
    """Reach the disk before the name does: a power cut must not leave a good name over empty files."""
    paths = sorted(folder.rglob("*"))
    readable = folder.stat().st_mode & 0o666  # as other files here: safetensors lets nobody else read
    for path in paths:
        if path.is_file():
            path.chmod(readable)
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    for path in (*(path for path in paths if path.is_dir()), folder):
        sync_folder(path)
