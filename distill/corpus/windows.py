"""Windows of a stream: its documents, some thousand at a time, as tables on disk, made when they are needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import datasets
import pyarrow.compute

from distill.corpus.documents import NO_DOCUMENT, READER_VERSION, First, keep_table, read_documents
from distill.corpus.shapes import Columns
from distill.corpus.streams import Stream

ROWS = 8192
"""Rows of a window at most."""
CHARACTERS = 8 << 20
"""Characters of documents with which a window ends, if it has fewer rows."""


class Windows:
    """The documents of a stream in its order, window by window, as tables (see `documents.FEATURES`).

    A table is kept in the cache folder of `datasets`, and read from there next time. What follows begins behind its
    last row, so that after an interruption nothing is read again but the rows of one file.
    """

    def __init__(self, stream: Stream, columns: Columns, limit: int | None = None) -> None:
        """Begin before the first window. No more than `limit` rows are read."""
        self._stream, self._columns, self._left = stream, columns, limit
        self._rows: Iterator[dict[str, Any]] | None = None
        self._number, self._next, self._is_over = 0, (0, 0), False
        self._first: First | None = None

    @property
    def words(self) -> str:
        """The way of reading, for a cache's identity."""
        return f"shuffled files in windows of {ROWS} rows or {CHARACTERS} characters"

    @property
    def files_begun(self) -> int:
        """Number of files of which rows were read."""
        return self._next[0] + 1

    def take(self) -> datasets.Dataset | None:
        """Return the next window; None behind the last one."""
        most = ROWS if self._left is None else min(ROWS, self._left)
        if self._is_over or not most:
            return None
        key = [READER_VERSION, self._columns.key(), self._stream.store_key, self.words, self._number, most]
        table = keep_table(lambda: self._documents(most), hashlib.sha256(json.dumps(key).encode()).hexdigest())
        characters = pyarrow.compute.sum(pyarrow.compute.utf8_length(table.data.column("document"))).as_py() or 0
        self._is_over = len(table) < most and characters < CHARACTERS
        if table[0]["source"] < 0:
            return None
        here = (table[len(table) - 1]["source"], table[len(table) - 1]["row"])
        if here != self._next:  # it was read from disk
            self._rows, self._next = None, here
        self._number += 1
        self._left = None if self._left is None else self._left - len(table)
        self._first = self._first or self._first_of(table)
        return table

    def _documents(self, most: int) -> Iterator[dict[str, Any]]:
        """Yield the documents of the next window."""
        if self._rows is None:
            self._rows = read_documents(self._stream.files, self._next, self._first)
        rows = characters = 0
        while rows < most and characters < CHARACTERS and (found := next(self._rows, None)) is not None:
            yield found
            rows, characters = rows + 1, characters + len(found["document"])
            self._next = (found["source"], found["row"])
        if not rows:
            yield NO_DOCUMENT | {"source": -1, "row": 0}  # `datasets` keeps no table without a row

    def _first_of(self, table: datasets.Dataset) -> First | None:
        """Return the kind and place of the first good row: all others must be of its kind."""
        for row in table.select_columns(["conversation", "source", "row", "fault"]):
            if not row["fault"]:
                return row["conversation"], f"{self._stream.files[row['source']].label}: row {row['row']}"
        return None
