"""Tokenisation of long texts in overlapping pieces, since a tokenizer needs a hundred times a text's size in memory."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Any

PIECE = 1 << 18
"""Characters of a piece."""
OVERLAP = 1 << 13
"""Characters that two pieces share."""
AGREEING = 32
"""Tokens in a row that two pieces must agree on, with their places, where one is left for the other."""
AT_ONCE = 4
"""Pieces that are tokenised at a time, each by a thread of the tokenizer."""


def long_ids(tokenizer: Any, text: str) -> list[int] | None:
    """Return the ids of a text without special tokens, as the tokenizer encodes it whole.

    Tokens depend on the text near them alone, so two pieces that overlap agree from a little behind the beginning of
    the second one on. None if two pieces do not, or if the tokenizer does not tell its tokens' places.
    """
    return _joined(_pieces(tokenizer, text)) if tokenizer.is_fast else None


class _Piece:
    """The tokens of a piece, and the places in the text of those that are asked for: all of them would take long."""

    def __init__(self, begin: int, encoding: Any) -> None:
        self.begin, self.ids, self._encoding = begin, encoding.ids, encoding

    def place(self, number: int) -> int:
        """Return the first character of a token."""
        return self.begin + int(self._encoding.token_to_chars(number)[0])

    def token(self, number: int) -> tuple[int, int]:
        """Return place and id of a token."""
        return self.place(number), self.ids[number]


def _pieces(tokenizer: Any, text: str) -> Iterator[_Piece]:
    begins = range(0, max(len(text) - OVERLAP, 1), PIECE)
    for first in range(0, len(begins), AT_ONCE):
        some = begins[first : first + AT_ONCE]
        found = tokenizer(
            [text[begin : begin + PIECE + OVERLAP] for begin in some],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            padding=False,
            truncation=False,
            verbose=False,
        )
        yield from map(_Piece, some, found.encodings)


def _joined(pieces: Iterator[_Piece]) -> list[int] | None:
    ids: list[int] = []
    left, start = next(pieces), 0
    for right in pieces:
        seam = _seam(left, right)
        if seam is None:
            return None
        ids += left.ids[start : seam[0]]
        left, start = right, seam[1]
    return ids + left.ids[start:]


def _seam(left: _Piece, right: _Piece) -> tuple[int, int] | None:
    """Return the first tokens of a run that both have, by their numbers on the left and on the right."""
    first = bisect.bisect_left(range(len(left.ids)), right.begin, key=left.place)
    shared = [left.token(number) for number in range(first, len(left.ids))]
    places = {token: number for number, token in reversed(list(enumerate(shared)))}
    run: list[tuple[int, int]] = []
    for number in range(len(right.ids) - AGREEING):
        run += [right.token(other) for other in range(number + len(run), number + AGREEING)]
        at = places.get(run[0])
        if at is not None and shared[at : at + AGREEING] == run:
            return first + at, number
        if run.pop(0)[0] > right.begin + OVERLAP:
            return None
    return None
