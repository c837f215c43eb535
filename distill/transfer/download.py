"""The way back from a bucket or a hub: into a folder beside the wanted one, each file checked, renamed when whole."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from distill.cache.format.folder import SUMS
from distill.errors import UserError
from distill.system.files import TEMPORARY, sha256_of, sync_folder, write_durably
from distill.system.locks import sole_writer
from distill.system.units import size
from distill.system.urls import explained
from distill.transfer import listing
from distill.transfer.listing import MOST_BYTES
from distill.transfer.remote import Remote

_PIECE = 1 << 20


def download(remote: Remote, folder: Path, began: Callable[[int, int], None], advance: Callable[[int], None]) -> None:
    """Copy what was pushed there into a new folder, or go on with a copy that was stopped.

    `began` receives the bytes of all files and of those that are here already, `advance` the copied bytes. Raises
    UserError for a place where nothing was pushed, a folder that has something in it, too little room, and a file
    that is not what its list says.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: is there already, and nothing is overwritten: give another --to, or remove it")
    sizes = remote.sizes()
    if SUMS not in sizes:
        raise UserError(
            f"{remote.name}: nothing that `distill push` finished is there ({SUMS} is missing). A cache that was "
            "copied there otherwise: distill merge URL --to CACHE"
        )
    if sizes[SUMS] > MOST_BYTES:
        raise UserError(f"{remote.name}: {SUMS} is too large for a list of files")
    with remote.open(SUMS) as file:
        content = file.read(MOST_BYTES + 1)
    sums = listing.decode(content, remote.name)
    if missing := sorted(sums.keys() - sizes.keys()):
        raise UserError(f"{remote.name}: {missing[0]} is missing: push it anew to another place")
    growing = folder.with_name(f".{folder.name}.pulled")
    with sole_writer(growing, what="copy", option="--to"):
        if (growing / SUMS).is_file() and (growing / SUMS).read_bytes() != content:
            raise UserError(f"{growing}: holds the beginning of another copy: remove it, or give another --to")
        write_durably(growing / SUMS, content)
        wanted = [name for name, digest in sums.items() if not _is_here(growing / name, sizes[name], digest)]
        left = sum(sizes[name] for name in wanted)
        if left > (free := shutil.disk_usage(growing).free):
            raise UserError(f"{folder}: {size(left)} are still to come, and {size(free)} are free: make room there")
        total = sum(sizes[name] for name in sums)
        began(total, total - left)
        for name in wanted:
            _copy(remote, name, growing / name, sizes[name], sums[name], advance)
        if folder.exists():
            folder.rmdir()
        growing.rename(folder)
        sync_folder(folder.parent)


def _is_here(path: Path, length: int, digest: str) -> bool:
    return path.is_file() and path.stat().st_size == length and sha256_of(path) == digest


def _copy(remote: Remote, name: str, path: Path, length: int, digest: str, advance: Callable[[int], None]) -> None:
    temporary = path.with_name(path.name + TEMPORARY)
    found, left = hashlib.sha256(), length + 1
    with explained(f"{remote.name}: {name}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with remote.open(name) as source, temporary.open("wb") as copy:
            while piece := source.read(min(_PIECE, left)):
                found.update(piece)
                copy.write(piece)
                left -= len(piece)
                advance(len(piece))
            copy.flush()
            os.fsync(copy.fileno())
    if found.hexdigest() != digest:
        temporary.unlink()
        raise UserError(
            f"{remote.name}: {name} is not what {SUMS} says (expected sha256 {digest[:12]}…, "
            f"found {found.hexdigest()[:12]}…): push it anew to another place"
        )
    temporary.replace(path)
