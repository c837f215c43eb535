"""The preview as a page: the counts of each source, and samples whole."""

from __future__ import annotations

from collections.abc import Sequence

from distill import __version__
from distill.corpus.summary import SourceCounts
from distill.recipes.preview.tokens import ShownDocument, escaped
from distill.report.contents import Cell, Content, Note, Page, Section, Table, Token, Tokens
from distill.report.corpus import source_tables
from distill.report.page import render

MADE_BY = "distill preview"
"""Generator that these pages name."""


def preview_page(
    title: str, facts: Sequence[str], counts: Sequence[SourceCounts], samples: Sequence[Sequence[ShownDocument]]
) -> str:
    """Return the page as HTML. `facts` are lines about the whole."""
    sections = [Section("sources", "What is read", [*_about_sources(counts), *map(Note, facts[1:])])]
    for number, documents in enumerate(samples):
        learned, tokens = (sum(getattr(each, name) for each in documents) for name in ("learned", "tokens"))
        contents: list[Content] = [Note(f"{learned:,} of {tokens:,} tokens are learned, the coloured ones.")]
        contents += [_tokens(document) for document in documents]
        sections.append(Section(f"sample-{number}", f"Training sample {number}", contents))
    page = Page(title, "What will be learned", facts[0], [], sections)
    return render(page, f"{MADE_BY} {__version__}")


def _about_sources(counts: Sequence[SourceCounts]) -> list[Content]:
    contents: list[Content] = [*source_tables({each.name: each.figures() for each in counts})]
    for each in counts:
        lengths = [
            [Cell(f"{low:,} to {2 * low - 1:,}"), Cell(f"{documents:,}", documents)]
            for low, documents in each.lengths.items()
        ]
        contents.append(Table([Cell("tokens"), Cell("documents")], lengths, caption=f"Lengths in {each.name}"))
    return contents


def _tokens(document: ShownDocument) -> Tokens:
    if not document.source:
        return Tokens(document.title, [])
    shown = [
        Token(escaped(piece.text), piece.is_learned, piece.is_special, piece.text.endswith("\n"))
        for piece in document.pieces
    ]
    return Tokens(document.title, shown)
