"""What a page is made of before it is HTML or Markdown: sections of tables, charts, texts and notes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup


@dataclass(frozen=True)
class Cell:
    """One cell of a table: the rounded `text` for reading, the exact `value` for checking and copying."""

    text: str
    value: float | None = None
    small: str = ""
    """A second, smaller line: an interval, a unit, an explanation."""
    small_values: tuple[float, ...] = ()
    """Exact values of the numbers in `small`."""
    best: bool = False
    role: str = ""
    """Model or run that the cell names; it takes that one's colour."""

    @property
    def exact(self) -> str:
        """The exact value, or those of an interval that is the text itself."""
        if self.value is not None:
            return repr(self.value)
        return "" if self.small else self.exact_small

    @property
    def exact_small(self) -> str:
        """The exact values of the smaller line."""
        return " ".join(map(repr, self.small_values))


@dataclass(frozen=True)
class Table:
    """Rows under a head; the first cell of a row says what the row is. With a `summary` it is folded away."""

    kind: ClassVar[str] = "table"
    head: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    summary: str = ""
    wraps: bool = False
    """Cells are words that may break into lines, not figures."""


@dataclass(frozen=True)
class Figure:
    """A chart with its title and what a reader should know of it."""

    chart: Markup
    title: str = ""
    note: str = ""


@dataclass(frozen=True)
class Figures:
    """Charts beside one another. Markdown leaves them out: every figure in them stands in a table too."""

    kind: ClassVar[str] = "figures"
    figures: Sequence[Figure]


@dataclass(frozen=True)
class Note:
    """A paragraph, and the exact values of the numbers in it."""

    kind: ClassVar[str] = "note"
    text: str
    values: tuple[float, ...] = ()

    @property
    def exact(self) -> str:
        """The exact values."""
        return " ".join(map(repr, self.values))


@dataclass(frozen=True)
class Continuation:
    """What one model wrote (or, without a role, what really came next)."""

    name: str
    role: str
    text: str


@dataclass(frozen=True)
class Sample:
    """A prompt and what follows it, by each model."""

    kind: ClassVar[str] = "sample"
    number: int
    prompt: str
    continuations: Sequence[Continuation]


@dataclass(frozen=True)
class Listing:
    """A text file, folded away."""

    kind: ClassVar[str] = "listing"
    summary: str
    text: str
    language: str


Block = Table | Figures | Note | Sample | Listing


@dataclass(frozen=True)
class Section:
    """A part of the page, of at least one block."""

    id: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole page. `verdict` is what a reader takes away who reads one sentence."""

    title: str
    subtitle: str
    verdict: str
    warnings: Sequence[str]
    sections: Sequence[Section]
