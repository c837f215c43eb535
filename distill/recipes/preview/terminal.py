"""The preview in a terminal: learned tokens in colour, or with marks below them where there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from distill.corpus.summary import SourceCounts, left_out_in_words
from distill.recipes.preview.tokens import Piece, ShownDocument, escaped

MOST_TOKENS = 400
"""Tokens of a sample that are printed."""
_WIDTH = 100
_BARS = 40
_LEARNED, _SPECIAL, _OTHER, _BORDER = "bold green", "magenta", "", "dim"


def print_sample(documents: Sequence[ShownDocument], title: str) -> None:
    """Print a sample's documents, token by token, up to `MOST_TOKENS`."""
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    colours = console.is_terminal and not console.no_color
    console.print(Text(f"\n{title}", style="bold"))
    left = MOST_TOKENS
    for document in documents:
        if left <= 0:
            break
        console.print(Text(f"-- {document.title}", _BORDER))
        if not document.source:
            continue
        shown = document.pieces[:left]
        left -= len(shown)
        for line in _lines(shown, console.width):
            _print_line(console, line, colours)
    tokens = sum(document.tokens for document in documents)
    if left <= 0 and tokens > MOST_TOKENS:
        console.print(f"… and more: {tokens:,} tokens in all; --html FILE shows them")


def _lines(pieces: Sequence[Piece], width: int) -> Iterator[list[tuple[Piece, str]]]:
    """Yield lines of pieces and their printed texts. A line ends where the text has one, or where it is full."""
    line: list[tuple[Piece, str]] = []
    used = 0
    for piece in pieces:
        text = escaped(piece.text)
        while text:
            room = width - used - 1
            if line and cell_len(text) > room:
                yield line
                line, used, room = [], 0, width - 1
            part = text[: max(room // 2, 1)] if cell_len(text) > room else text
            line.append((piece, part))
            used += cell_len(part) + 1
            text = text[len(part) :]
        if piece.text.endswith("\n"):
            yield line
            line, used = [], 0
    if line:
        yield line


def _print_line(console: Console, line: list[tuple[Piece, str]], colours: bool) -> None:
    text, marks = Text(), ""
    for piece, part in line:
        style = _LEARNED if piece.is_learned else _SPECIAL if piece.is_special else _OTHER
        text.append(part, style).append("|", _BORDER)
        marks += ("~" if piece.is_learned else " ") * cell_len(part) + " "
    console.print(text, no_wrap=True, crop=False, overflow="ignore")
    if not colours and marks.strip():
        console.print(Text(marks.rstrip()), no_wrap=True, crop=False, overflow="ignore")


def source_lines(counts: SourceCounts) -> Iterator[str]:
    """Yield the lines about one source: its counts, what is left out, and a histogram of its documents' lengths."""
    yield f"{counts.name}: {counts.described()}"
    if counts.left_out:
        yield f"  left out of {counts.rows:,} rows: {left_out_in_words(counts.left_out)}"
    most = max(counts.lengths.values(), default=1)
    for low, documents in counts.lengths.items():
        yield f"  {f'{low:,}-{2 * low - 1:,}':>15} tokens {documents:>11,}  {'#' * round(_BARS * documents / most)}"
