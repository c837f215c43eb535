"""Where a finished cache lies: a folder, used in place, or an fsspec URL, with a local copy of the shards in use."""

from __future__ import annotations

import contextlib
import hashlib
import os
from array import array
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import fsspec

from distill.cache.format.folder import JOURNAL, MANIFEST, SHARDS, Manifest, read_journal, read_manifest
from distill.errors import UserError
from distill.system.files import TEMPORARY

LOCAL_COPY_BYTES = 100 * 10**9
"""Room for the local copies of a URL's shards, unless told otherwise."""

_PIECE = 1 << 20


class Storage(Protocol):
    """A place to read a cache from: `name` is what the user calls it; in `folder`, a local one, lie manifest, journal
    and what else lies beside the shards."""

    name: str
    folder: Path

    def shard(self, number: int) -> Path:
        """The local file of a shard."""


def is_url(location: str | Path) -> bool:
    """Whether this is a URL and not a path."""
    return "://" in str(location)


def open_storage(location: str | Path, local_copy_bytes: int = LOCAL_COPY_BYTES) -> Storage:
    """The storage at a path or an fsspec URL. Raises UserError when a URL cannot be read."""
    return UrlStorage(str(location), local_copy_bytes) if is_url(location) else FolderStorage(Path(location))


class FolderStorage:
    """A folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.name, self.folder = str(folder), folder

    @cached_property
    def _manifest(self) -> Manifest:
        return read_manifest(self.folder)

    def shard(self, number: int) -> Path:
        """Return the file of a shard."""
        return self.folder / self._manifest.shard_file(number)


class UrlStorage:
    """A cache at an fsspec URL.

    What lies beside the shards is copied when it is opened, a shard when it is first used. Copies are checked against
    the journal's hashes, shared by all processes of the machine, kept for the next run, and, when they take more than
    `local_copy_bytes`, removed, those first that were used longest ago. They lie in $XDG_CACHE_HOME/distill (or
    ~/.cache/distill).
    """

    def __init__(self, url: str, local_copy_bytes: int) -> None:
        self.name, self.limit = url, local_copy_bytes
        with self._explained():
            filesystem, self._root = fsspec.core.url_to_fs(url)
            manifest = filesystem.cat_file(f"{self._root}/{MANIFEST}")
        # Another manifest is another cache: nothing of the one before is taken for it.
        key = hashlib.sha256(url.encode() + b"\n" + manifest).hexdigest()[:16]
        self.folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill" / key
        self._copy_beside_shards(filesystem)
        # 40 bytes a shard are all that is kept of the journal.
        self._hashes, self._sizes = bytearray(), array("Q")
        self._manifest = read_manifest(self.folder)
        for shard, entry in sorted(read_journal(self.folder, self._manifest).items()):
            if shard != len(self._sizes):
                break  # an unfinished cache: who reads it says so
            self._hashes += bytes.fromhex(entry.sha256)
            self._sizes.append(entry.bytes)

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(self._sizes)

    def shard(self, number: int) -> Path:
        digest = self._hashes[32 * number : 32 * number + 32]
        path = self.folder / SHARDS / f"{number:06d}.{digest.hex()[:16]}.safetensors"
        try:
            os.utime(path)  # used just now
        except FileNotFoundError:
            self._make_room(self._sizes[number])
            self._download(self._manifest.shard_file(number), path, self._sizes[number], digest)
        return path

    def _download(self, file: str, path: Path, size: int, digest: bytearray) -> None:
        """Copy, check, rename: other processes see all of a file or nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
        found, left = hashlib.sha256(), size + 1
        with self._explained(file):
            # Asked for anew in each process: connections do not survive a fork, and fsspec knows that.
            filesystem, root = fsspec.core.url_to_fs(self.name)
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
        """Remove the copies used longest ago until `size` more bytes fit. Who has one open keeps it open."""
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
        for source, relative in self._beside_shards(filesystem):
            target = self.folder / relative
            with self._explained(str(relative)):
                target.parent.mkdir(parents=True, exist_ok=True)
                # The journal may have grown; all else belongs to the manifest.
                if str(relative) == JOURNAL or not target.exists():
                    temporary = target.with_name(f"{target.name}.{os.getpid()}{TEMPORARY}")
                    filesystem.get_file(source, str(temporary))
                    temporary.replace(target)

    def _beside_shards(self, filesystem: Any) -> Iterator[tuple[str, PurePosixPath]]:
        with self._explained():
            top = filesystem.ls(self._root, detail=True)
            for entry in top:
                name = PurePosixPath(entry["name"]).name
                if entry["type"] == "file":
                    yield entry["name"], PurePosixPath(name)
                elif name != SHARDS:
                    for file in filesystem.find(entry["name"]):
                        relative = PurePosixPath(name) / PurePosixPath(file).relative_to(PurePosixPath(entry["name"]))
                        if ".." in relative.parts:
                            raise UserError(f"{self.name}: a file in it is called {relative}: not a cache")
                        yield file, relative

    @contextlib.contextmanager
    def _explained(self, file: str = "") -> Iterator[None]:
        """What file systems raise, in one line."""
        what = f"{self.name}: {file}" if file else self.name
        try:
            yield
        except UserError:
            raise
        except FileNotFoundError:
            message = "is missing" if file else f"no cache here ({MANIFEST} is missing)"
            raise UserError(f"{what}: {message}") from None
        except ImportError as error:
            raise UserError(f"{what}: {error}") from None
        except Exception as error:  # every file system has exceptions of its own
            raise UserError(f"{what}: cannot be read ({type(error).__name__}: {error})") from None
