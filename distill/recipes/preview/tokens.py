"""A sample's tokens as the texts they stand for, each with what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distill.corpus import Gathered, Samples
from distill.system.progress import visible

_CONTEXT = 16
"""Tokens that are decoded together at most: a token's text may depend on those before it."""
_LONGEST_CHARACTER = 4
"""Tokens that may share one character."""


@dataclass(frozen=True)
class Piece:
    """One token, or several that share a character."""

    text: str
    tokens: int
    is_learned: bool
    is_special: bool
    """True for the tokens that begin and end texts and turns."""


@dataclass(frozen=True)
class ShownDocument:
    """The part of a document, or of the padding, that lies in a sample."""

    first: int
    """Place of its first token in the sample."""
    source: str
    """Name of its file or data set; "" for padding."""
    goes_on: bool
    """True if its beginning is in the sample before."""
    pieces: list[Piece]

    @property
    def title(self) -> str:
        """The document's place and name in one line."""
        what = f"{self.source}{', goes on from the sample before' if self.goes_on else ''}"
        return f"from token {self.first}: {escaped(what) if self.source else f'padding, {self.tokens:,} tokens'}"

    @property
    def tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)

    @property
    def learned(self) -> int:
        return sum(piece.tokens for piece in self.pieces if piece.is_learned)


def shown_documents(
    samples: Samples | Gathered, index: int, tokenizer: Any, sources: Sequence[str]
) -> list[ShownDocument]:
    """Return the documents of a sample in order. `sources` are the names of files, by number."""
    sample, before = samples[index], samples[index - 1]["document_hash"] if index else torch.zeros(1)
    ids, mask = sample["input_ids"].tolist(), sample["loss_mask"].tolist()
    starts = (sample["position_ids"] == 0).nonzero()[:, 0].tolist()
    found = []
    for first, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        document = int(sample["document_hash"][first])
        is_padding, goes_on = not document, first == 0 and document == int(before[-1])
        learned = [False, *mask[first : end - 1]]  # the mask stands at the position before the token
        pieces = [] if is_padding else list(_pieces(ids[first:end], learned, tokenizer))
        number = int(sample["source"][first])
        name = sources[number] if number < len(sources) else f"source {number}"
        shown = pieces or [Piece("", end - first, False, False)]
        found.append(ShownDocument(first, "" if is_padding else name, goes_on, shown))
    return found


def _pieces(ids: Sequence[int], learned: Sequence[bool], tokenizer: Any) -> Iterator[Piece]:
    special = special_ids(tokenizer)
    context: list[int] = []  # tokens whose text is known
    waiting: list[int] = []  # tokens of a character that is not whole yet
    for place, token in enumerate(ids):
        waiting.append(token)
        before, text = (_decoded(tokenizer, tokens) for tokens in (context, context + waiting))
        is_last = place + 1 == len(ids) or learned[place + 1] != learned[place]
        if text.endswith("\ufffd") and len(waiting) < _LONGEST_CHARACTER and not is_last:
            continue
        own = text[len(before) :] if text.startswith(before) else _decoded(tokenizer, waiting)
        yield Piece(own, len(waiting), learned[place], token in special)
        context = [*context, *waiting][-_CONTEXT:] if len(context) < _CONTEXT else waiting
        waiting = []


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of a tokenizer's special tokens, and of those that its chat template may use."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {number for number, token in added.items() if token.special}


def escaped(text: str) -> str:
    r"""Return a text in one line: ends of lines and tabs as `\n` and `\t`, what steers a terminal as `\x1b`."""
    return visible(text.replace("\t", "\\t").replace("\n", "\\n"))


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""
