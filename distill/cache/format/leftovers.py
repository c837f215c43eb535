"""Temporary files that a killed writer (`distill cache-teacher`) left in a cache's folder, and their removal."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from distill.cache.format.folder import JOURNAL, MANIFEST, PART, SHARDS, TOKEN_ORDER, TOKENIZER
from distill.cache.format.head import HEAD
from distill.system.files import TEMPORARY

SHARD_NAME = re.compile(r"((held_out|train)-)?\d{6,}\.safetensors")
SIDE_NAME = re.compile(r"(held_out|train)-\d{6,}\.batches")
"""Names of the side files of shards in flight."""


def is_leftover(name: str) -> bool:
    """Tell whether a kill left this file half written. No other file is touched."""
    whole = name.removesuffix(TEMPORARY)
    ours = whole in (MANIFEST, JOURNAL, PART, TOKEN_ORDER, TOKENIZER, HEAD) or SHARD_NAME.fullmatch(whole) is not None
    return ours and whole != name


def is_unused(folder: Path) -> bool:
    """Tell whether a cache was begun and holds no answer of the teacher: no shard, no journal line, nothing else."""
    if not (folder / MANIFEST).is_file() or (folder / SHARDS).is_symlink():
        return False
    if (folder / JOURNAL).is_file() and (folder / JOURNAL).stat().st_size:
        return False
    shards = list((folder / SHARDS).iterdir()) if (folder / SHARDS).is_dir() else []
    known = (MANIFEST, JOURNAL, PART, TOKEN_ORDER, TOKENIZER, HEAD, SHARDS)
    return all(is_leftover(child.name) for child in shards) and all(
        child.name in known or is_leftover(child.name) for child in folder.iterdir()
    )


def remove_leftovers(folder: Path) -> None:
    """Remove the files that kills left half written."""
    remove(folder, is_leftover)
    remove(folder / SHARDS, is_leftover)


def remove(folder: Path, is_meant: Callable[[str], bool]) -> None:
    if folder.name == SHARDS and folder.is_symlink():
        return  # nothing outside the cache is deleted
    for child in list(folder.iterdir()) if folder.is_dir() else []:
        if is_meant(child.name):
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()
