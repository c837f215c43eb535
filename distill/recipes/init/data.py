"""The user's data at a glance: rows, shape and amount, before any tokenizer reads them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from distill.corpus.faults import BadRow
from distill.corpus.reading import find_sources, local_files
from distill.corpus.shapes import BY_NAME, NAMES, shape_of
from distill.errors import UserError
from distill.forecast.sizes import BYTES_A_TOKEN_OF_TEXT, bytes_of_text

MOST_ROWS = 2000
"""Rows that are looked at: enough to tell the shape, and few enough for any file."""
FEW = 2
"""Documents that a corpus has at least: one to learn from, and one to measure on."""


@dataclass(frozen=True)
class Data:
    """Facts about a corpus."""

    path: str
    rows: int | None
    """Rows of the files, if they are few enough to have been counted. None for more, and for a hub's data set."""
    tokens: int | None
    """Tokens by the size of the files. None means that the data are on the hub, and not measured."""
    shape: str
    """Shape of the rows, as `distill preview` names it; empty if unknown."""
    is_conversation: bool

    @classmethod
    def look(cls, path: str) -> Data:
        """Look at a file, a folder, or the name of a hub's data set, which is not fetched.

        Raises UserError for a path that is neither, rows of no known shape, and a single document.
        """
        files = local_files(path)
        if files is None:
            return cls(path, None, None, "", False)
        sources = find_sources(path, None, "train")
        rows = list(itertools.islice(itertools.chain.from_iterable(source.rows() for source in sources), MOST_ROWS))
        good = [content for _, content in rows if not isinstance(content, BadRow)]
        if not good:
            raise UserError(f"{path}: none of its first rows can be read: mend them, or give other data")
        shapes = [shape for row in good if (shape := shape_of(row, BY_NAME)) is not None]
        if not shapes:
            raise UserError(
                f"{path}: its rows have the columns {', '.join(map(str, good[0]))}, and none is known to hold text: "
                "rename one to text (or two to prompt and completion), or give a file of your own corpus.columns"
            )
        if len(rows) < FEW:
            raise UserError(
                f"{path}: is one document, and one more is needed to measure the student on: split it, for example "
                'into a passage a line of a .jsonl file ({"text": …})'
            )
        tokens = max(1, round(bytes_of_text(files) / BYTES_A_TOKEN_OF_TEXT))
        counted = None if len(rows) >= MOST_ROWS else len(rows)
        first = shapes[0]
        return cls(path, counted, tokens, NAMES[first.kind], first.is_conversation)

    def described(self) -> str:
        """Return the facts in a line."""
        if self.tokens is None:
            return f"data: {self.path}, a data set of the hub, not looked at"
        rows = f"more than {MOST_ROWS:,}" if self.rows is None else f"{self.rows:,}"
        return f"data: {self.path}, {rows} rows of {self.shape}, about {self.tokens:,} tokens"


def held_out_share(data: Data, samples: int | None) -> float:
    """Return the share of the documents that is never trained on: about 200 samples, of few documents more of them.

    Documents are chosen by a hash, so of a handful a small share may choose none.
    """
    share = 0.002 if samples is None else min(0.1, max(0.002, 200 / samples))
    if data.rows is not None:
        share = max(share, min(0.3, 5 / data.rows))
    return round(share, 3)
