"""Corpora of which only a part is read: a hub data set, or large files here, as files in a shuffled order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import datasets
import numpy as np

from distill.corpus.documents import Rows
from distill.corpus.own_reader import OwnReader
from distill.corpus.reading import CorpusFile, Row, local_files
from distill.corpus.shapes import Columns, columns_to_read
from distill.corpus.text_files import COMPRESSIONS
from distill.corpus.written import is_written
from distill.errors import UserError, first_line

LARGE = 256 << 20
"""Size of the files here, in bytes of text, from which on a corpus is read as a stream."""
GROWTH = 3
"""Bytes of text in a byte of a compressed file."""
_SAMPLED = 1 << 20
"""Bytes of a file that are hashed: a third each at its beginning, in the middle and at its end."""


File = TypeVar("File", bound=Rows, covariant=True)


@dataclass(frozen=True)
class Stream(Generic[File]):
    """The files of a corpus in the order in which they are read."""

    files: Sequence[File]
    fingerprint: str
    """Hash of the files, their content as far as it is known without reading, and their order."""
    store_key: str
    """Hash that changes with the files on this machine too."""
    names: Sequence[str]
    """The files' names, the same on every machine."""
    sizes: Sequence[int]
    """The files' sizes, in bytes of text, or all 1 where they are not known."""
    revision: str | None = None
    """Commit of a hub data set."""


@dataclass(frozen=True)
class HubFile:
    """One file of a split of a hub data set."""

    label: str
    data: datasets.IterableDataset
    index: int
    count: int
    columns: Columns
    key: str
    """Hash of the data set's files and their order."""
    owner: int = 0
    limit: int | None = None

    def content_key(self) -> str:
        """Return what tells this file's content from others', without reading it."""
        return f"hub {self.key} {self.index}"

    def rows(self) -> Iterator[Row]:
        """Yield the rows of this file alone; no other one is opened."""
        data = self.data
        if data.column_names:
            data = data.select_columns(columns_to_read(data.column_names, self.columns))
        yield from enumerate(data.shard(self.count, self.index), start=1)


def is_large(files: Sequence[Path]) -> bool:
    """Tell whether files on this machine are so large that they are read as a stream."""
    return sum(map(text_bytes, files)) >= LARGE


def text_bytes(file: Path) -> int:
    """Return about how many bytes of text are in a file, by its size and format."""
    return file.stat().st_size * (GROWTH if file.suffix.lower() in (*COMPRESSIONS, ".parquet") else 1)


def is_stream(path: str, split: str, reader: OwnReader | None = None) -> bool:
    """Tell whether a corpus is read as a stream: any hub data set, and large files but those that a model wrote."""
    if is_written(path):
        return False
    files = local_files(path, split, reader)
    return files is None or is_large(files)


def open_stream(
    path: str,
    name: str | None,
    split: str,
    columns: Columns,
    seed: int,
    revision: str | None = None,
    reader: OwnReader | None = None,
) -> Stream[Rows]:
    """Open a corpus as a stream of files, shuffled with `seed`. No file's content is read but for a sample of it."""
    files = local_files(path, split, reader)
    if files is None:
        return open_hub(path, name, split, columns, seed, revision)
    if revision is not None:
        raise UserError(f"corpus.revision: {revision}: {path} is on this machine, and has no revisions")
    return _local(Path(path).expanduser(), files, columns, seed, reader)


def _local(root: Path, files: list[Path], columns: Columns, seed: int, reader: OwnReader | None) -> Stream[Rows]:
    order = np.random.default_rng(seed).permutation(len(files)).tolist()
    files = [files[number] for number in order]
    names = [file.relative_to(root).as_posix() if file != root else file.name for file in files]
    known = [[name, file.stat().st_size, _sample(file)] for name, file in zip(names, files, strict=True)]
    fingerprint = _sha256(["files", known, *([] if reader is None else [reader.source])])
    here = [[str(file.absolute()), file.stat().st_mtime_ns, file.stat().st_ctime_ns] for file in files]
    sources = [CorpusFile(file, columns, reader=reader) for file in files]
    return Stream(sources, fingerprint, _sha256([fingerprint, here]), names, [text_bytes(file) for file in files])


def _sample(file: Path) -> str:
    """Return a hash of parts of a file, since reading all of it may take hours."""
    digest, size = hashlib.sha256(), file.stat().st_size
    each = _SAMPLED // 3
    with open(file, "rb") as opened:
        for begin in (0, size // 2, max(0, size - each)):
            opened.seek(begin)
            digest.update(opened.read(each))
    return digest.hexdigest()


def open_hub(
    path: str, name: str | None, split: str, columns: Columns, seed: int, revision: str | None
) -> Stream[HubFile]:
    """Open a data set of the hub as a stream of files, shuffled with `seed`. Raises UserError if it cannot be found."""
    try:
        builder = datasets.load_dataset_builder(path, name, revision=revision)
        data = builder.as_streaming_dataset(split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        at = f", revision {revision}" if revision else ""
        raise UserError(
            f"{path}: neither a file or folder here nor a hub data set that can be loaded "
            f"(configuration {name}, split {split}{at}): {first_line(error)}"
        ) from error
    assert isinstance(data, datasets.IterableDataset)
    found = dict(builder.config.data_files or {}).get(split)
    commits = sorted({tuple(map(str, origin)) for origin in getattr(found, "origin_metadata", [])})
    commit = commits[0][-1] if len(commits) == 1 and len(commits[0]) > 1 else None
    order = np.random.default_rng(seed).permutation(data.num_shards).tolist()
    names = [str(file).rpartition(f"@{commit}/")[2] for file in found or []]
    fingerprint = _sha256(["hub", path, name, split, names, commits, builder.hash if not found else "", order])
    known = len(names) == len(order)
    labels = [f"{path}/{names[index]}" if known else f"{path}, file {index}" for index in order]
    files = [
        HubFile(label, data, index, len(order), columns, fingerprint)
        for label, index in zip(labels, order, strict=True)
    ]
    return Stream(files, fingerprint, fingerprint, labels, [1] * len(order), commit)


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
