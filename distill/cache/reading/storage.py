"""The place of a finished cache: a folder, used in place, or an fsspec URL, with local copies of the shards in use."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from distill.cache.format.folder import (
    JOURNAL,
    MANIFEST,
    PART,
    SHARDS,
    TOKEN_ORDER,
    TOKENIZER,
    Manifest,
    read_journal,
    read_manifest,
)
from distill.cache.format.head import HEAD
from distill.errors import UserError
from distill.system.files import TEMPORARY, is_inside, read_bounded, sha256_of, write_durably
from distill.system.urls import explained

LOCAL_COPY_BYTES = 100 * 10**9
"""Default room for the local copies of a URL's shards."""

_PIECE = 1 << 20
_MOST_BESIDE = 2**34
"""Bytes of a file beside the shards; the largest is the head of a teacher."""


class Storage(Protocol):
    """A place to read a cache from.

    `name` is the user's name for it. `folder`, a local one, holds manifest, journal and the other files beside the
    shards.
    """

    name: str
    folder: Path

    def shard(self, number: int) -> Path:
        """Return the local file of a shard."""

    def drop_copy(self, number: int) -> bool:
        """Remove the local copy of a shard, which is then fetched anew. Returns False if there is only the original."""


def is_url(location: str | Path) -> bool:
    """Tell whether this is a URL and not a path."""
    return "://" in str(location)


def open_storage(location: str | Path, local_copy_bytes: int = LOCAL_COPY_BYTES) -> Storage:
    """Open the storage at a path or an fsspec URL. Raises UserError if a URL cannot be read."""
    return UrlStorage(str(location), local_copy_bytes) if is_url(location) else FolderStorage(Path(location))


class FolderStorage:
    """A folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.name, self.folder = str(folder), folder

    @cached_property
    def _manifest(self) -> Manifest:
        return read_manifest(self.folder)

    def shard(self, number: int) -> Path:
        """Return the file of a shard. Raises UserError for a link out of the cache."""
        path = self.folder / self._manifest.shard_file(number)
        if path.is_symlink() and not is_inside(path, self.folder):
            raise UserError(f"{path}: is a link out of the cache and is not followed: copy the shard here")
        return path

    def drop_copy(self, number: int) -> bool:
        return False


class UrlStorage:
    """A cache at an fsspec URL.

    The files beside the shards are copied when it is opened, a shard when it is first used. Copies are checked against
    the journal's hashes, shared by all processes of the machine, and kept for the next run. If they take more than
    `local_copy_bytes`, those used longest ago are removed first. They lie in $XDG_CACHE_HOME/distill (or
    ~/.cache/distill).
    """

    def __init__(self, url: str, local_copy_bytes: int) -> None:
        self.name, self.limit = url, local_copy_bytes
        with self._explained():
            filesystem, self._root = fsspec.core.url_to_fs(url)
            content = io.BytesIO()
            self._copy(filesystem, f"{self._root}/{MANIFEST}", content)
            manifest = content.getvalue()
        # Another manifest means another cache, so copies of the earlier one are not used for it.
        key = hashlib.sha256(url.encode() + b"\n" + manifest).hexdigest()[:16]
        self.folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill" / key
        self._list = self.folder.with_suffix(".json")
        self._copy_beside_shards(filesystem)
        # 48 bytes a shard are all that is kept of the journal, which may be that of a part.
        self._numbers, self._hashes, self._sizes = array("Q"), bytearray(), array("Q")
        self._manifest = read_manifest(self.folder)
        for shard, entry in sorted(read_journal(self.folder, self._manifest).items()):
            self._numbers.append(shard)
            self._hashes += bytes.fromhex(entry.sha256)
            self._sizes.append(entry.bytes)

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(self._sizes)

    def shard(self, number: int) -> Path:
        path, size, digest = self._copy_of(number)
        try:
            os.utime(path)  # used just now
            is_whole = path.stat().st_size == size
        except FileNotFoundError:
            is_whole = False
        if not is_whole:
            self._make_room(size)
            self._download(self._manifest.shard_file(number), path, size, digest)
        return path

    def drop_copy(self, number: int) -> bool:
        self._copy_of(number)[0].unlink(missing_ok=True)
        return True

    def _copy_of(self, number: int) -> tuple[Path, int, bytearray]:
        """Return the place of a shard's copy, its size and its sha256."""
        place = bisect_left(self._numbers, number)
        digest, size = self._hashes[32 * place : 32 * place + 32], self._sizes[place]
        return self.folder / SHARDS / f"{number:06d}.{digest.hex()[:16]}.safetensors", size, digest

    def _download(self, file: str, path: Path, size: int, digest: bytearray) -> None:
        """Copy, check, rename: other processes see all of a file or nothing."""
        temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
        found, left = hashlib.sha256(), size + 1
        with self._explained(file):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Asked for anew in each process: connections do not survive a fork, and fsspec knows that.
            filesystem, root = fsspec.core.url_to_fs(self.name)
            self._check(filesystem, f"{root}/{file}")
            with filesystem.open(f"{root}/{file}", "rb") as source, temporary.open("wb") as copy:
                while piece := source.read(min(_PIECE, left)):
                    found.update(piece)
                    copy.write(piece)
                    left -= len(piece)
        if found.digest() != digest:
            temporary.unlink()
            raise UserError(
                f"{self.name}: {file} is not what its journal says (expected sha256 {digest.hex()[:12]}…, "
                f"found {found.hexdigest()[:12]}…): copy the cache there anew"
            )
        temporary.replace(path)

    def _make_room(self, size: int) -> None:
        """Remove the copies used longest ago until `size` more bytes fit. A process that has one open keeps it open."""
        copies = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder / SHARDS) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    copies.append((status.st_mtime_ns, status.st_size, entry.path))
        total = size + sum(size for _, size, _ in copies)
        for _, freed, path in sorted(copies):
            if total <= self.limit:
                break
            Path(path).unlink(missing_ok=True)
            total -= freed

    def _copy_beside_shards(self, filesystem: Any) -> None:
        """Copy what is not here, or not as it came. The journal may have grown; all else belongs to the manifest."""
        known = self._sums()
        sums = dict(known)
        for source, relative, size in self._beside_shards(filesystem):
            target, name = self.folder / relative, str(relative)
            with self._explained(name):
                target.parent.mkdir(parents=True, exist_ok=True)
                is_here = name != JOURNAL and target.is_file() and target.stat().st_size == size
                if not is_here or sha256_of(target) != known.get(name):
                    temporary = target.with_name(f"{target.name}.{os.getpid()}{TEMPORARY}")
                    with temporary.open("wb") as copy:
                        self._copy(filesystem, source, copy)
                    sums[name] = sha256_of(temporary)
                    temporary.replace(target)
        if sums != known:
            with self._explained():
                write_durably(self._list, json.dumps(sums).encode())

    def _sums(self) -> dict[str, Any]:
        """Return the sha256 of each file beside the shards as it came; nothing is known if the list is damaged."""
        try:
            found = json.loads(read_bounded(self._list))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _copy(self, filesystem: Any, source: str, target: BinaryIO) -> None:
        """Copy a file that lies beside the shards. Raises UserError if it is too large, a link out, or no file."""
        self._check(filesystem, source)
        left = _MOST_BESIDE
        with filesystem.open(source, "rb") as file:
            while piece := file.read(_PIECE):
                target.write(piece)
                left -= len(piece)
                if left < 0:
                    raise UserError(f"{source}: larger than a file of a cache beside its shards may be: not copied")

    def _check(self, filesystem: Any, source: str) -> None:
        """Raise UserError for a link that leads out of the cache, and unless it is a plain file."""
        if isinstance(filesystem, LocalFileSystem):
            path = Path(source)
            if path.exists() and not (path.is_file() and is_inside(path, Path(self._root))):
                raise UserError(f"{source}: is no plain file of this cache, and is not copied")

    def _beside_shards(self, filesystem: Any) -> Iterator[tuple[str, PurePosixPath, int]]:
        """Return each file's place there, its name below the cache, and its size."""
        with self._explained():
            top = filesystem.ls(self._root, detail=True)
            for entry in top:
                name = PurePosixPath(entry["name"]).name
                if name not in (MANIFEST, JOURNAL, TOKEN_ORDER, HEAD, PART, TOKENIZER):
                    continue
                if entry["type"] != "directory":
                    yield entry["name"], PurePosixPath(name), entry["size"]
                else:
                    for file in filesystem.find(entry["name"]):
                        relative = PurePosixPath(name) / PurePosixPath(file).relative_to(PurePosixPath(entry["name"]))
                        if ".." in relative.parts:
                            raise UserError(f"{self.name}: a file in it is called {relative}: not a cache")
                        yield file, relative, filesystem.size(file)

    def _explained(self, file: str = "") -> contextlib.AbstractContextManager[None]:
        """Explain the errors of the file system, about a file of the cache or the cache itself."""
        if file:
            return explained(f"{self.name}: {file}")
        return explained(self.name, f"no cache here ({MANIFEST} is missing)")
