"""The layout of samples, which pieces of which documents each one holds, as a function of lengths and of turns.

Shapes: L sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from distill.corpus.best_fit import best_fit
from distill.corpus.packing import Packing

Turns = Callable[[int], tuple[list[int], list[int]]]
"""Function of a document's number: the tokens at which its turns begin, and those behind its system and first turn."""


@dataclass(frozen=True)
class LongDocuments:
    """Numbers of documents that are longer than a sample."""

    split: int = 0
    """Number of them that were split, or cut; in a stream, of all that were cut."""
    inside: int = 0
    """Number of pieces of them that begin inside a turn, which is longer than a sample by itself."""
    left_out: int = 0
    """Number of them that were left out."""

    @classmethod
    def together(cls, counts: Iterable[LongDocuments]) -> LongDocuments:
        """Return the sums."""
        each = [(count.split, count.inside, count.left_out) for count in counts]
        return cls(*map(sum, zip(*each, strict=True))) if each else cls()

    def __str__(self) -> str:
        """Return the counts in words, empty without a document."""
        found = [f"{self.left_out:,} documents left out"] if self.left_out else []
        if self.split:
            inside = f" ({self.inside:,} times inside a turn)" if self.inside else ""
            found.append(f"{self.split:,} documents split{inside}")
        return ", ".join(found)


@dataclass(frozen=True)
class Layout:
    """Pieces of documents, sample after sample. Arrays are int64 [pieces] but for `firsts`."""

    documents: np.ndarray
    """Number of each piece's document."""
    begins: np.ndarray
    """The piece's first token in its document."""
    ends: np.ndarray
    """The token behind its last."""
    openings: np.ndarray
    """Tokens of the document's beginning that stand in front of the piece again, without loss."""
    firsts: np.ndarray
    """Number of each sample's first piece, and the number of all pieces: int64 [samples + 1]."""
    long: LongDocuments

    @classmethod
    def of(cls, packing: Packing, lengths: np.ndarray, length: int, turns: Turns) -> Layout:
        """Return the layout of documents of these `lengths` (int64, at least 1) in samples of `length` tokens."""
        if packing.way == "stream":
            return _stream(lengths, length, packing.begin)
        return _whole(packing, lengths, length, turns)


def _stream(lengths: np.ndarray, length: int, begin: bool) -> Layout:
    """Cut the documents, one behind the other, every `length` tokens, or one earlier where a first token is added."""
    borders = np.concatenate([[0], np.cumsum(lengths)])
    samples = _sample_begins(borders, length) if begin else np.arange(0, borders[-1], length)
    seams = np.union1d(borders, samples)
    starts, stops = seams[:-1], seams[1:]
    documents = np.searchsorted(borders, starts, side="right") - 1
    firsts = np.append(np.searchsorted(starts, samples), len(starts))
    begins = starts - borders[documents]
    cut = len(np.unique(documents[begins > 0]))
    return Layout(documents, begins, stops - borders[documents], np.zeros_like(starts), firsts, LongDocuments(cut))


def _sample_begins(borders: np.ndarray, length: int) -> np.ndarray:
    """Return the places in the stream where samples begin. One that begins inside a document has room for one less."""
    begins, at, total = [], 0, int(borders[-1])
    known = set(borders.tolist())
    while at < total:
        begins.append(at)
        at += length if at in known else length - 1
    return np.array(begins, dtype=np.int64)


def _whole(packing: Packing, lengths: np.ndarray, length: int, turns: Turns) -> Layout:
    """Let each document that fits be one piece; share samples among pieces if the packing does."""
    is_long = lengths > length
    kept = np.flatnonzero(~is_long)
    pieces = [np.stack([kept, np.zeros_like(kept), lengths[kept], np.zeros_like(kept)])]
    inside = 0
    if packing.long != "skip":
        for document in np.flatnonzero(is_long).tolist():
            cut, within = _split(packing, int(lengths[document]), length, *turns(document))
            pieces.append(np.array([(document, *piece) for piece in cut], dtype=np.int64).T)
            inside += within
    documents, begins, ends, openings = np.concatenate(pieces, axis=1)
    order = np.lexsort((begins, documents))
    documents, begins, ends, openings = (column[order] for column in (documents, begins, ends, openings))
    bins = np.arange(len(documents))
    if packing.shares and len(documents):
        added = (begins > 0) & (openings == 0) & packing.begin
        bins = best_fit(ends - begins + openings + added, length)
        order = np.argsort(bins, kind="stable")
        documents, begins, ends, openings, bins = (
            column[order] for column in (documents, begins, ends, openings, bins)
        )
    firsts = np.searchsorted(bins, np.arange(int(bins[-1]) + 2 if len(bins) else 1))
    left_out = int(is_long.sum()) if packing.long == "skip" else 0
    long = LongDocuments(int(is_long.sum()) - left_out, inside, left_out)
    return Layout(documents, begins, ends, openings, firsts, long)


def _split(
    packing: Packing, total: int, length: int, turns: list[int], openings: list[int]
) -> tuple[list[tuple[int, int, int]], int]:
    """Return the pieces of a long document as (begin, end, opening), and how many begin inside a turn.

    A piece ends before a turn if any turn begins in its last part, else where the sample is full. The first turns that
    take at most half a sample are put in front of the later pieces.
    """
    if packing.long == "cut":
        turns, openings = [], []
    opening = max((end for end in openings if end <= length // 2), default=0)
    turns = [turn for turn in turns if turn > opening]
    pieces, begin, inside = [], 0, 0
    while begin < total:
        before = opening if begin else 0
        room = length - before - (1 if packing.begin and begin and not before else 0)
        end = min(begin + room, total)
        if end < total:
            end = max((turn for turn in turns if begin < turn <= end), default=end)
            inside += end not in turns
        pieces.append((begin, end, before))
        begin = end
    return pieces, inside
