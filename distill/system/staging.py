"""Folders that are complete or absent: each grows beside its name and gets it when everything in it is done."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from distill.errors import UserError
from distill.system.files import sole_writer, sync_file, sync_folder


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which becomes `folder` at the end of the `with`, and goes when the body raises.

    A process that dies in between leaves it under its other name, where the next one removes it. Raises UserError for
    a `folder` that has something in it, before and after, and while another process fills it.
    """
    _refuse(folder)
    with _growing(folder) as new:
        yield new
        _settle(new)
        _refuse(folder)
        if folder.exists():
            folder.rmdir()
        new.rename(folder)
        sync_folder(folder.parent)


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which replaces `folder` at the end of the `with`, and goes when the body raises.

    Raises UserError while another process fills it.
    """
    recover(folder)
    old = _old(folder)
    with _growing(folder) as new:
        shutil.rmtree(old, ignore_errors=True)
        yield new
        _settle(new)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Bring back the folder that a process was about to replace when it died, between one name and the other."""
    if folder.exists() or not _old(folder).exists():
        return
    with sole_writer(_new(folder)):  # not while it is being replaced
        if not folder.exists():
            _old(folder).rename(folder)
            sync_folder(folder.parent)
        shutil.rmtree(_new(folder), ignore_errors=True)


@contextlib.contextmanager
def _growing(folder: Path) -> Iterator[Path]:
    """Yield the empty folder in which the next content of `folder` grows; remove it when the body raises."""
    new = _new(folder)
    if new.is_symlink():
        new.unlink()  # otherwise its target would be emptied
    with sole_writer(new):
        try:
            for path in new.iterdir():  # left behind by a process that died
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            yield new
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise


def _new(folder: Path) -> Path:
    """Return the place where the next content of `folder` grows."""
    return folder.with_name(f".{folder.name}.new")


def _old(folder: Path) -> Path:
    """Return the place of the present content of `folder` for the moment in which it is replaced."""
    return folder.with_name(f".{folder.name}.old")


def _refuse(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give the name of a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty, and an export replaces nothing: give another --to, or remove it")


def _settle(folder: Path) -> None:
    """Sync every file and folder: a power cut must not leave a good name over empty files.

    Files become readable to whom the folder is: safetensors lets their owner alone read its own.
    """
    paths = sorted(folder.rglob("*"))
    readable = folder.stat().st_mode & 0o666
    for path in paths:
        if path.is_file():
            path.chmod(readable)
            sync_file(path)
    for path in (*(path for path in paths if path.is_dir()), folder):
        sync_folder(path)
