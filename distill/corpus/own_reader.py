"""Readers of the user's own, for files of any format: a function that yields a file's rows, named in the experiment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill import plugins
from distill.corpus.faults import BadRow
from distill.errors import UserError
from distill.system.blame import blame, failed

Read = Callable[[Path], Iterable[Mapping[str, Any]]]
"""A file's path → its rows, each a mapping of named columns, as a line of a .jsonl file has them."""


@dataclass(frozen=True)
class OwnReader:
    """A function of the user's that reads a file."""

    name: str
    source: str
    """Hash of its code, which counts as part of the files that it reads."""
    function: Read = field(compare=False)

    def rows(self, path: Path) -> Iterator[tuple[int, Mapping[str, Any] | BadRow]]:
        """Yield the rows of a file, numbered from 1. Raises UserError with the user's line where the function fails."""
        where = f"{path}: corpus.reader {self.name}"
        try:
            rows: Iterable[Any] = self.function(path)
            for number, row in enumerate(rows, start=1):
                is_row = isinstance(row, Mapping)
                yield number, row if is_row else BadRow(f"a {type(row).__name__}, not a mapping of named columns")
        except BaseException as error:
            if not failed(error) or isinstance(error, UserError):
                raise
            raise UserError(f"{where} failed: {blame(error, self.function)}") from error


def load_reader(name: str | None) -> OwnReader | None:
    """Return the reader of a name, `file.py:function` or `package.module:function`; None for no name.

    Raises UserError if there is none of that name.
    """
    if name is None:
        return None
    return OwnReader(name, plugins.source_of(name, "reader"), plugins.load(name, "reader"))
