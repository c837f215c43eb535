"""Places to push to and pull from: any fsspec URL, and repositories of the Hugging Face hub, which take commits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from distill.errors import UserError
from distill.system.files import is_inside
from distill.system.urls import explained
from distill.transfer.contents import Entry

_UNASKED = (".gitattributes",)
"""Files that a hub puts into every new repository."""
_REPOSITORY = re.compile(r"hf://(?P<kind>datasets/)?(?P<id>[^/@]+/[^/@]+)")
_COMMIT_FILES, _COMMIT_BYTES = 100, 5 * 10**9
"""Largest number and size of the files of one commit: a hub allows few commits an hour."""


class Remote(Protocol):
    """A place of files by name."""

    name: str

    def sizes(self) -> dict[str, int]:
        """Return the size of each file that is there."""

    def put(self, entries: Iterable[Entry], done: Callable[[Entry], None]) -> None:
        """Write files, each whole before `done` is called with it."""

    def remove(self, name: str) -> None: ...

    def open(self, name: str) -> BinaryIO: ...


def open_remote(url: str, public: bool = False) -> Remote:
    """Return the place at an fsspec URL. Raises UserError for a URL that no installed package knows.

    `public` lets a repository of a hub that is new be seen by all.
    """
    match = _REPOSITORY.fullmatch(url.rstrip("/"))
    if match is not None and match["id"].partition("/")[0] != "buckets":
        return HubRepository(url.rstrip("/"), match["id"], "dataset" if match["kind"] else "model", public)
    if public:
        raise UserError("--public: is for a new repository of the hub, such as hf://OWNER/NAME")
    return UrlFolder(url.rstrip("/"))


class UrlFolder:
    """A folder at an fsspec URL."""

    def __init__(self, url: str) -> None:
        self.name = url
        with explained(url):
            self._filesystem, self._root = fsspec.core.url_to_fs(url)

    def sizes(self) -> dict[str, int]:
        with explained(self.name):
            self._filesystem.invalidate_cache()
            try:
                found = self._filesystem.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
        root = self._root.rstrip("/") + "/"
        sizes = {path.removeprefix(root): entry["size"] for path, entry in found.items() if path.startswith(root)}
        return {name: size for name, size in sizes.items() if name not in _UNASKED}

    def put(self, entries: Iterable[Entry], done: Callable[[Entry], None]) -> None:
        for entry in entries:
            path = self._path(entry.name)
            with explained(f"{self.name}: {entry.name}", verb="written"):
                if isinstance(self._filesystem, LocalFileSystem):
                    self._filesystem.makedirs(self._filesystem._parent(path), exist_ok=True)
                if isinstance(entry.source, bytes):
                    self._filesystem.pipe_file(path, entry.source)
                else:
                    self._filesystem.put_file(str(entry.source), path)
            done(entry)

    def remove(self, name: str) -> None:
        with explained(f"{self.name}: {name}", verb="written"):
            self._filesystem.rm_file(self._path(name))

    def open(self, name: str) -> BinaryIO:
        path = self._path(name)
        if isinstance(self._filesystem, LocalFileSystem) and Path(path).exists():
            plain = Path(path).is_file() and is_inside(Path(path), Path(self._root))
            if not plain:
                raise UserError(f"{path}: is no plain file of this folder, and is not copied")
        with explained(f"{self.name}: {name}"):
            opened: BinaryIO = self._filesystem.open(path, "rb")
            return opened

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


class HubRepository:
    """A repository of the Hugging Face hub: files go there in commits of many, and are read as from any URL."""

    def __init__(self, url: str, repository: str, kind: str, public: bool) -> None:
        import huggingface_hub

        self.name, self._repository, self._kind = url, repository, kind
        self._hub: Any = huggingface_hub
        self._is_private = not public
        self._folder = UrlFolder(url)

    def sizes(self) -> dict[str, int]:
        return self._folder.sizes()

    def put(self, entries: Iterable[Entry], done: Callable[[Entry], None]) -> None:
        for group in grouped(entries):
            with explained(self.name, verb="written"):
                hub = self._hub.HfApi()
                hub.create_repo(self._repository, repo_type=self._kind, private=self._is_private, exist_ok=True)
                operations = [
                    self._hub.CommitOperationAdd(
                        path_in_repo=entry.name,
                        path_or_fileobj=entry.source if isinstance(entry.source, bytes) else str(entry.source),
                    )
                    for entry in group
                ]
                words = group[0].name if len(group) == 1 else f"{len(group)} files from {group[0].name} on"
                hub.create_commit(
                    self._repository, operations, commit_message=f"distill push: {words}", repo_type=self._kind
                )
            for entry in group:
                done(entry)

    def remove(self, name: str) -> None:
        self._folder.remove(name)

    def open(self, name: str) -> BinaryIO:
        return self._folder.open(name)


def grouped(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Yield the files in groups for one commit each."""
    group: list[Entry] = []
    for entry in entries:
        if group and (len(group) == _COMMIT_FILES or sum(each.size for each in group) + entry.size > _COMMIT_BYTES):
            yield group
            group = []
        group.append(entry)
    if group:
        yield group
