"""Contents of a page before it is HTML or Markdown: sections of tables, charts, texts and notes."""

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
    """Model or run that the cell names, and whose colour it takes."""

    @property
    def exact(self) -> str:
        """The exact value, or the exact values of an interval if the text is one."""
        if self.value is not None:
            return repr(self.value)
        return "" if self.small else self.exact_small

    @property
    def exact_small(self) -> str:
        """The exact values of the smaller line."""
        return " ".join(map(repr, self.small_values))


@dataclass(frozen=True)
class Table:
    """Rows under a head. The first cell of a row names the row. A table with a `summary` is folded."""

    kind: ClassVar[str] = "table"
    head: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    summary: str = ""
    wraps: bool = False
    """True if the cells are words that may break into lines, and not numbers."""


@dataclass(frozen=True)
class Chart:
    """A chart with its title and a note for the reader."""

    svg: Markup
    title: str = ""
    note: str = ""


@dataclass(frozen=True)
class Charts:
    """Charts beside one another. Markdown leaves them out: every number in them stands in a table too."""

    kind: ClassVar[str] = "charts"
    charts: Sequence[Chart]


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
    """A continuation by one model. Without a role it is the true text."""

    name: str
    role: str
    text: str


@dataclass(frozen=True)
class Prompt:
    """A prompt and its continuations by each model."""

    kind: ClassVar[str] = "prompt"
    number: int
    text: str
    continuations: Sequence[Continuation]


@dataclass(frozen=True)
class Token:
    """A token's text, in one line."""

    text: str
    is_learned: bool
    is_special: bool
    ends_line: bool
    """True if the text that the token stands for ends a line."""


@dataclass(frozen=True)
class Tokens:
    """A text token by token. Markdown leaves it out."""

    kind: ClassVar[str] = "tokens"
    title: str
    tokens: Sequence[Token]


@dataclass(frozen=True)
class Listing:
    """A text file, folded away."""

    kind: ClassVar[str] = "listing"
    summary: str
    text: str
    language: str


Content = Table | Charts | Note | Prompt | Tokens | Listing


@dataclass(frozen=True)
class Section:
    """A section of the page. It has at least one content."""

    id: str
    title: str
    contents: Sequence[Content]


@dataclass(frozen=True)
class Page:
    """A whole page. `verdict` is for readers who read only one sentence."""

    title: str
    subtitle: str
    verdict: str
    warnings: Sequence[str]
    sections: Sequence[Section]
