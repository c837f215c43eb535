"""The corpus on disk (files of several formats, or a hub data set), read one row at a time."""

from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import json
import logging
import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import datasets
import pyarrow as pa
import pyarrow.parquet

from distill.corpus.faults import BadRow
from distill.corpus.folders import documents_in, files_of_split
from distill.corpus.own_reader import OwnReader
from distill.corpus.shapes import BY_NAME, Columns, columns_to_read
from distill.corpus.text_files import COMPRESSIONS, LONGEST_LINE, lines, open_text
from distill.corpus.written import is_written
from distill.corpus.written_parts import WrittenPart, written_parts
from distill.errors import UserError, first_line, nearest_path
from distill.system.files import is_inside

KINDS = (".txt", ".md", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
TABLES = (".parquet", ".arrow")
"""Formats that are compressed inside."""
KNOWN_KINDS = f"{', '.join(KINDS)}; all but parquet and arrow also with {', '.join(COMPRESSIONS)} behind"
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)

Row = tuple[int, Mapping[str, Any] | BadRow]
"""The row's number in its file, from 1 (of JSON: the line's), and its columns, or the reason why it has none."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CorpusFile:
    """One local file. Every format becomes numbered rows of named columns."""

    path: Path
    columns: Columns
    owner: int = 0
    """Number of the corpus's source that it belongs to."""
    limit: int | None = None
    """Largest number of rows that are read of that source."""
    reader: OwnReader | None = None

    @property
    def label(self) -> str:
        """The file's name in error messages."""
        return str(self.path)

    def content_key(self) -> str:
        """Return a hash of the file's bytes and format, never of its date, so that an edited file is noticed.

        The code of a reader of the user's own is a format.
        """
        kind = kind_of(self.path) if self.reader is None else f"reader {self.reader.source}"
        digest = hashlib.sha256(f"{kind} {self.path.suffix} {self.columns.text_column}\n".encode())
        with open(self.path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()

    def rows(self) -> Iterator[Row]:
        """Yield the rows in file order. A text file is one row, and its only column takes the name of the texts.

        Text is UTF-8 (a byte order mark is dropped) and its line ends arrive as "\\n".
        """
        if self.reader is not None:
            yield from self.reader.rows(self.path)
            return
        kind = kind_of(self.path)
        try:
            if kind in TABLES:
                yield from (_parquet_rows if kind == ".parquet" else _arrow_rows)(self.path, self.columns)
                return
            with open_text(self.path) as file:
                if kind in (".txt", ".md"):
                    yield 1, {self.columns.text_column: file.read(LONGEST_LINE)}
                elif kind in (".csv", ".tsv"):
                    yield from _csv_rows(file, self.label, "," if kind == ".csv" else "\t")
                else:
                    yield from _json_rows(file, self.label)
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: not UTF-8 text ({error.reason}): convert the file to UTF-8") from error
        except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
            packed = {".gz": "gzip", ".xz": "xz"}.get(self.path.suffix.lower(), "compressed")
            raise UserError(f"{self.path}: damaged or incomplete {packed} file ({error})") from error
        except PermissionError as error:
            raise UserError(f"{self.path}: no permission to read it") from error
        except (pa.ArrowException, csv.Error, OSError) as error:  # OSError: how pyarrow reports damaged pages
            raise UserError(f"{self.path}: cannot be read as {kind}: {first_line(error)}") from error


@dataclass(frozen=True)
class HubDataset:
    """One split of a data set of the Hugging Face hub."""

    label: str
    data: datasets.Dataset
    columns: Columns
    owner: int = 0
    limit: int | None = None

    def content_key(self) -> str:
        """Return the fingerprint that `datasets` gives to this split of this revision."""
        return f"hub {self.data._fingerprint}"

    def rows(self) -> Iterator[Row]:
        """Yield the rows in the data set's order."""
        wanted = columns_to_read(self.data.column_names, self.columns)
        yield from enumerate(self.data.select_columns(wanted), start=1)


Source = CorpusFile | HubDataset | WrittenPart


def find_sources(
    path: str, name: str | None, split: str, columns: Columns = BY_NAME, reader: OwnReader | None = None
) -> list[Source]:
    """Return the files at `path` (a folder's files recursively, sorted by name), or the hub data set of that name.

    The hub is asked only if nothing on this machine has the name. In a folder whose files are named after splits, only
    those of `split` are read. Files of other formats, and those that only tell about a data set, are left out with one
    logged line. Hidden files and folders are left out. A folder that a model wrote is its parts. With a `reader` files
    are of any format.
    """
    if is_written(path):
        if reader is not None:
            raise UserError(f"corpus.reader: {path} was written by `distill generate`, which needs none: take it out")
        return list(written_parts(path))
    files = local_files(path, split, reader)
    if files is None:
        return [HubDataset(path, _load_from_hub(path, name, split), columns)]
    return [CorpusFile(file, columns, reader=reader) for file in files]


def local_files(path: str, split: str = "train", reader: OwnReader | str | None = None) -> list[Path] | None:
    """Return the corpus's files on this machine in order, or None if nothing here has the name and the hub may know it.

    With a `reader`, itself or its name, they are of any format, and here. Raises UserError if a file cannot be read, or
    if the path is neither here nor a name that the hub could know.
    """
    if not path.strip():
        raise UserError("corpus.path: is empty: give a file, a folder, or a hub data set's name")
    local = Path(path).expanduser()
    if local.is_dir():
        return _files_in(local, path, split, reads_all=reader is not None)
    if local.exists():
        if kind_of(local) is None and reader is None:
            raise UserError(
                f"{path}: not a format that can be read (known: {KNOWN_KINDS}; a reader of your own: corpus.reader)"
            )
        _check_plain(local)
        if split != "train":
            raise UserError(
                f"{path}: corpus.split: '{split}' chooses files of a folder or of a hub data set; this is one file: "
                "take it out, or name the folder"
            )
        return [local]
    looks_like_path = not HUB_NAME.fullmatch(path) or kind_of(local) is not None or Path(local.parts[0]).exists()
    if looks_like_path or reader is not None:
        near = nearest_path(local, cutoff=0.5)
        raise UserError(f"{path}: no such file or folder{near} (and not a hub data set's name, owner/name)")
    return None


def kind_of(path: Path) -> str | None:
    """Return the format that a file's name promises, without `.gz` and the like, or None if it cannot be read."""
    kind = path.suffix.lower()
    if kind in COMPRESSIONS:
        kind = Path(path.stem).suffix.lower()
        return kind if kind in KINDS and kind not in TABLES else None
    return kind if kind in KINDS else None


def _files_in(folder: Path, path: str, split: str, *, reads_all: bool) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}): allow it, or remove the folder")

    visible: list[Path] = []
    for place, below, files_here in os.walk(folder, onerror=refuse):
        below[:] = [name for name in below if not name.startswith(".")]
        names = [*files_here, *(name for name in below if Path(place, name).is_symlink())]
        visible += [Path(place, name) for name in names if not name.startswith(".")]
    visible.sort(key=lambda file: file.relative_to(folder).parts)
    for file in visible:
        if file.is_symlink() and not is_inside(file, folder):
            raise UserError(f"{file}: is a link out of {path} and is not followed: copy it here, or remove the link")
        if not file.exists():
            raise UserError(f"{file}: is a link to nothing: remove it")
    readable = [file for file in documents_in(visible) if kind_of(file) or (reads_all and not file.is_dir())]
    for file in readable:
        _check_plain(file)
    if not readable:
        raise UserError(f"{path}: no corpus file in this folder (known: {KNOWN_KINDS})")
    files = files_of_split(folder, readable, split, path)
    if others := [file.name for file in visible if file not in set(readable)]:
        left_out = f"left out {len(others)} of other formats or about the data: {others[:5]}"
        _tell_once(f"{path}: read {len(files)} files, {left_out}")
    if len(files) < len(readable):
        chosen, unchosen = (
            [file.relative_to(folder).as_posix() for file in readable if (file in set(files)) is wanted][:5]
            for wanted in (True, False)
        )
        _tell_once(f"{path}: split {split} is {chosen}; left out {unchosen}")
    return files


@functools.lru_cache(maxsize=256)
def _tell_once(line: str) -> None:
    """Log a line about a folder, which is looked at several times."""
    log.warning("%s", line)


def _check_plain(file: Path) -> None:
    """Raise UserError for a pipe, which may never answer, a device, which may never end, or a link to nothing."""
    if not file.is_file():
        raise UserError(f"{file}: is no plain file: remove it, or put the file itself there")


def _load_from_hub(path: str, name: str | None, split: str) -> datasets.Dataset:
    try:
        data = datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{path}: neither a file or folder here nor a hub data set that can be loaded "
            f"(configuration {name}, split {split}): {first_line(error)}"
        ) from error
    assert isinstance(data, datasets.Dataset)
    return data


def _json_rows(file: TextIO, label: str) -> Iterator[Row]:
    """Yield the rows of a file with one object a line, or of one list or object (which is held in memory whole)."""
    line = next((line for line in lines(file, label) if line.strip()), "")
    rows: Iterator[tuple[int, Any]]
    if line.lstrip().startswith("["):
        found = _parse(line + file.read())
        if isinstance(found, BadRow):
            raise UserError(f"{label}: {found.reason}")
        rows = enumerate(found, start=1)
    elif _begins_an_object(line) and not isinstance(one := _parse(line + file.read(LONGEST_LINE)), BadRow):
        rows = iter([(1, one)])  # one object over several lines
    else:
        file.seek(0)
        rows = ((number, _parse(text)) for number, text in enumerate(lines(file, label), start=1) if text.strip())
    for number, row in rows:
        is_row = isinstance(row, (dict, BadRow))
        yield number, row if is_row else BadRow(f"a {type(row).__name__}, not an object with named columns")


def _begins_an_object(line: str) -> bool:
    return line.lstrip().startswith("{") and isinstance(_parse(line), BadRow)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadRow(f"not JSON ({error}); expected one object a line, or one list of objects")


def _csv_rows(file: TextIO, label: str, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses fields over 128 KiB, which articles exceed
    reader = csv.DictReader(lines(file, label), strict=True, delimiter=delimiter)
    header = reader.fieldnames or []
    if twice := [name for place, name in enumerate(header) if name in header[:place]]:
        raise UserError(f"{label}: the header has column '{twice[0]}' twice: rename one of them")
    if len(header) == 1 and delimiter == "," and (other := next((sign for sign in ";\t|" if sign in header[0]), None)):
        raise UserError(
            f"{label}: the header has no comma, but {other!r}: fields of a .csv file end with commas, those of a .tsv "
            "file with tabs: convert it"
        )
    for number, row in enumerate(reader, start=1):
        mark = "comma" if delimiter == "," else "tab"
        too_many = BadRow(f"more fields than the header has: quote fields that hold a {mark}")
        yield number, too_many if None in row else row


def _parquet_rows(path: Path, columns: Columns) -> Iterator[Row]:
    with pyarrow.parquet.ParquetFile(path) as file:
        wanted = columns_to_read(file.schema_arrow.names, columns)
        yield from _rows(file.iter_batches(batch_size=256, columns=wanted))


def _arrow_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """Yield the rows of an Arrow file in either of its two formats; `datasets` writes streams."""
    with pa.OSFile(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        wanted = columns_to_read(reader.schema.names, columns)
        yield from _rows(_checked(batch).select(wanted) for batch in batches)


def _checked(batch: pa.RecordBatch) -> pa.RecordBatch:
    batch.validate(full=True)
    return batch


def _rows(batches: Iterable[pa.RecordBatch]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, 256):  # rows as Python values, a few at a time
            for row in batch.slice(start, 256).to_pylist():
                number += 1
                yield number, row
