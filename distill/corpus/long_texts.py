"""Tokenisation of long texts in overlapping pieces, since a tokenizer needs a hundred times a text's size in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

PIECE = 1 << 20
"""Characters of a piece."""
OVERLAP = 1 << 13
"""Characters that two pieces share."""
AGREEING = 32
"""Tokens in a row that two pieces must agree on, with their places, where one is left for the other."""

Tokens = list[tuple[int, int]]
"""Place of each token's first character in the text, and its id."""


def long_ids(tokenizer: Any, text: str) -> list[int] | None:
    """Return the ids of a text without special tokens, as the tokenizer encodes it whole.

    Tokens depend on the text near them alone, so two pieces that overlap agree from a little behind the beginning of
    the second one on. None if two pieces do not, or if the tokenizer does not tell its tokens' places.
    """
    if not tokenizer.is_fast:
        return None

    def tokens(begin: int) -> Tokens:
        found = tokenizer(
            text[begin : begin + PIECE + OVERLAP],
            add_special_tokens=False,
            return_offsets_mapping=True,
            padding=False,
            truncation=False,
            verbose=False,
        )
        return [(begin + at, token) for (at, _), token in zip(found["offset_mapping"], found["input_ids"], strict=True)]

    return _joined(tokens, range(0, max(len(text) - OVERLAP, 1), PIECE))


def _joined(tokens: Callable[[int], Tokens], begins: Sequence[int]) -> list[int] | None:
    ids: list[int] = []
    left = tokens(begins[0])
    for begin in begins[1:]:
        right = tokens(begin)
        seam = _seam(left, right, begin)
        if seam is None:
            return None
        ids += [token for _, token in left[: seam[0]]]
        left = right[seam[1] :]
    return ids + [token for _, token in left]


def _seam(left: Tokens, right: Tokens, begin: int) -> tuple[int, int] | None:
    """Return the first tokens of a run that both have, by their numbers on the left and on the right."""
    first = next((number for number in range(len(left)) if left[number][0] >= begin), len(left))
    places = {token: number for number, token in reversed(list(enumerate(left[first:], start=first)))}
    for number in range(len(right) - AGREEING):
        at = places.get(right[number])
        if at is not None and left[at : at + AGREEING] == right[number : number + AGREEING]:
            return at, number
        if right[number][0] > begin + OVERLAP:
            return None
    return None
