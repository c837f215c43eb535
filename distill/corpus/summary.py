"""Counts of a corpus, source by source: its documents and tokens, what is learned, what is left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from distill.corpus.faults import MOST_KINDS

EMPTY, UNLEARNABLE, DUPLICATE = "empty", "no token to learn", "exact duplicate"
BEYOND, LONG = "beyond its weight", "longer than a sample"
"""Reasons why a document is left out, beside the kinds of bad rows."""


@dataclass(frozen=True)
class SourceCounts:
    """Numbers of rows, documents and tokens of one source."""

    name: str
    rows: int = 0
    """Rows that were read."""
    documents: int = 0
    """Documents that are kept, held-out ones included."""
    held_out: int = 0
    """Documents that are held out."""
    tokens: int = 0
    """Tokens of the kept documents."""
    learned: int = 0
    """Tokens of the kept documents that are learned."""
    longer: int = 0
    """Documents that are longer than a sample."""
    lengths: Mapping[int, int] = field(default_factory=dict)
    """Numbers of documents by length: the key is the smallest length of the range, a power of 2."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Numbers of rows that are left out, by reason."""

    @property
    def share_learned(self) -> float:
        """Share of the tokens that is learned."""
        return self.learned / max(self.tokens, 1)

    def figures(self) -> dict[str, Any]:
        """Return the numbers as JSON values, without the name and the lengths."""
        figures = asdict(self)
        del figures["name"], figures["lengths"]
        return figures

    def described(self) -> str:
        """Return the counts in one line."""
        return (
            f"{self.documents:,} documents ({self.held_out:,} held out), {self.tokens:,} tokens, "
            f"{self.share_learned:.1%} of them learned; {self.longer:,} documents are longer than a sample"
        )


def left_out_in_words(left_out: Mapping[str, int]) -> str:
    """Return the rows that are left out in words, such as `12 exact duplicate, 3 empty`; "" for none."""
    told = [f"{rows:,} {reason}" for reason, rows in list(left_out.items())[:MOST_KINDS]]
    others = sum(list(left_out.values())[MOST_KINDS:])
    return ", ".join([*told, f"{others:,} of other kinds"] if others else told)


def together(counts: Sequence[SourceCounts]) -> SourceCounts:
    """Return the sums over several sources."""
    lengths: Counter[int] = Counter()
    left_out: Counter[str] = Counter()
    for each in counts:
        lengths.update(each.lengths)
        left_out.update(each.left_out)
    numbers = ("rows", "documents", "held_out", "tokens", "learned", "longer")
    sums = {name: sum(getattr(each, name) for each in counts) for name in numbers}
    return SourceCounts("all", **sums, lengths=dict(sorted(lengths.items())), left_out=dict(left_out.most_common()))


def count_source(
    name: str,
    lengths: np.ndarray,
    learned: np.ndarray,
    held_out: np.ndarray,
    left_out: Mapping[str, int],
    sequence_length: int,
) -> SourceCounts:
    """Count one source. The arrays are of its kept documents: tokens, learned tokens, and bool for those held out."""
    floors, counts = np.unique(2 ** np.floor(np.log2(lengths)).astype(np.int64), return_counts=True)
    return SourceCounts(
        name,
        rows=len(lengths) + sum(left_out.values()),
        documents=len(lengths),
        held_out=int(held_out.sum()),
        tokens=int(lengths.sum()),
        learned=int(learned.sum()),
        longer=int((lengths > sequence_length).sum()),
        lengths=dict(zip(floors.tolist(), counts.tolist(), strict=True)),
        left_out={reason: rows for reason, rows in left_out.items() if rows},
    )
