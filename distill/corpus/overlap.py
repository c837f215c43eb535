"""Texts that stand in a corpus word for word, found by the hashes of their n-grams in one pass over the corpus.

Shapes: W words of a text, H different n-grams that are looked for.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

WORDS = 13
"""Words of an n-gram, as in GPT-3's analysis of contamination (Brown et al. 2020, appendix C)."""
LEAST_WORDS = 8
"""Words of the shortest text that is looked for, as a whole; fewer words stand in a row by chance."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_FILTER_BITS = 20
_KNOWN_WORDS = 1 << 20
"""Words whose hashes are kept."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class _Grams:
    """All n-grams of one number of words that are looked for."""

    hashes_H: np.ndarray
    """Sorted uint64."""
    pairs: np.ndarray
    """Rows of (place in `hashes_H`, item), int64 `[pairs, 2]`."""
    is_near: np.ndarray
    """True at the low bits of each hash: a filter that most n-grams of a corpus do not pass."""

    @classmethod
    def of(cls, hashes: np.ndarray, items: np.ndarray) -> _Grams:
        hashes_H, places = np.unique(hashes, return_inverse=True)
        is_near = np.zeros(1 << _FILTER_BITS, dtype=bool)
        is_near[_low(hashes_H)] = True
        return cls(hashes_H, np.stack([places.reshape(-1), items], axis=1), is_near)

    def found_in(self, hashes: np.ndarray) -> np.ndarray:
        """Return the places in `hashes_H` of those that are among `hashes`."""
        near = hashes[self.is_near[_low(hashes)]]
        places = np.searchsorted(self.hashes_H, near)
        places = np.minimum(places, len(self.hashes_H) - 1)
        return places[self.hashes_H[places] == near]


class Overlaps:
    """Items, such as the documents of a benchmark, that are looked for in a corpus.

    An item overlaps if any of its texts has `WORDS` words in a row that a text of the corpus has too, whatever their
    case and punctuation, or if the whole of a shorter text (of at least `LEAST_WORDS`) stands there.
    """

    def __init__(self, items: Sequence[Sequence[str]]) -> None:
        self._words, self._items = _Words(), len(items)
        by_size: dict[int, tuple[list[np.ndarray], list[np.ndarray]]] = {}
        for number, texts in enumerate(items):
            for text in texts:
                words_W = self._words.hashes(text)
                size = min(len(words_W), WORDS)
                if size >= LEAST_WORDS:
                    hashes, owners = by_size.setdefault(size, ([], []))
                    hashes.append(_grams(words_W, size))
                    owners.append(np.full(len(hashes[-1]), number))
        self._grams = {size: _Grams.of(*map(np.concatenate, found)) for size, found in by_size.items()}

    def look(self, texts: Iterable[str]) -> np.ndarray:
        """Return a mask (bool) of the items that overlap with any of the corpus's `texts`."""
        seen = {size: np.zeros(len(grams.hashes_H), dtype=bool) for size, grams in self._grams.items()}
        for text in texts if self._grams else ():
            words_W = self._words.hashes(text)
            for size, grams in self._grams.items():
                seen[size][grams.found_in(_grams(words_W, size))] = True
        overlapping = np.zeros(self._items, dtype=bool)
        for size, grams in self._grams.items():
            overlapping[grams.pairs[seen[size][grams.pairs[:, 0]], 1]] = True
        return overlapping


class _Words:
    """Hashes of words, which are kept for the most recent ones."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def hashes(self, text: str) -> np.ndarray:
        """Return the hashes of a text's words in order: uint64 `[W]`."""
        if len(self._known) > _KNOWN_WORDS:
            self._known.clear()
        words = _WORD.findall(text.lower())
        for word in set(words) - self._known.keys():
            digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
            self._known[word] = int.from_bytes(digest, "little")
        return np.fromiter(map(self._known.__getitem__, words), dtype=np.uint64, count=len(words))


def _grams(words_W: np.ndarray, size: int) -> np.ndarray:
    """Return the hash of each n-gram: uint64 `[W - size + 1]`, none for fewer words. Sums overflow on purpose."""
    count = max(len(words_W) - size + 1, 0)
    hashes = np.zeros(count, dtype=np.uint64)
    for place in range(size if count else 0):
        hashes = hashes * _FACTOR + words_W[place : place + count]
    return hashes


def _low(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(64 - _FILTER_BITS)).astype(np.int64)
