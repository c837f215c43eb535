"""Documents that fit are never cut; long ones are split at turns, left out or cut, and each token is there once."""

from __future__ import annotations

from itertools import chain, pairwise

import numpy as np
import pytest

from distill.corpus.layout import Layout, LongDocuments
from distill.corpus.packing import Packing
from distill.errors import UserError

WAYS = [Packing(way, long, begin) for way in ("documents", "none") for long in ("split", "cut") for begin in (0, 1)]
WAYS += [Packing("stream", "cut", begin) for begin in (False, True)]
TURNS = {2: ([7, 12, 14, 30], [3, 5])}


def layout(packing: Packing, lengths: list[int], length: int = 16) -> Layout:
    return Layout.of(packing, np.array(lengths), length, lambda document: TURNS.get(document, ([], [])))


def pieces(found: Layout) -> list[list[tuple[int, int, int, int]]]:
    """(document, begin, end, opening) of each sample's pieces."""
    columns = zip(found.documents, found.begins, found.ends, found.openings, strict=True)
    rows = [tuple(int(value) for value in row) for row in columns]
    return [rows[first:stop] for first, stop in pairwise(found.firsts.tolist())]


@pytest.mark.parametrize("packing", WAYS, ids=lambda packing: packing.words or packing.way)
@pytest.mark.parametrize("seed", range(4))
def test_every_token_is_in_one_piece_and_no_sample_is_too_long(packing: Packing, seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 40, size=30).tolist()
    samples = pieces(layout(packing, lengths))
    tokens = [(document, at) for sample in samples for document, begin, end, _ in sample for at in range(begin, end)]
    assert sorted(tokens) == [(document, at) for document, length in enumerate(lengths) for at in range(length)]
    for sample in samples:
        added = [opening or (packing.begin and begin > 0) for _, begin, _, opening in sample]
        assert 0 < sum(end - begin for _, begin, end, _ in sample) + sum(added) <= 16
    if packing.way != "stream":
        whole = {
            document for sample in samples for document, begin, end, _ in sample if end - begin == lengths[document]
        }
        assert whole == {document for document, length in enumerate(lengths) if length <= 16}


def test_a_long_conversation_is_split_at_turns_behind_its_first_ones() -> None:
    found = layout(Packing("none", "split"), [4, 16, 33])
    assert pieces(found)[2:] == [[(2, 0, 14, 0)], [(2, 14, 25, 5)], [(2, 25, 33, 5)]]
    assert found.long == LongDocuments(split=1, inside=1)
    small = layout(Packing("none", "split"), [4, 16, 33], length=8)
    assert {opening for *_, opening in chain(*pieces(small))} == {0, 3}, "the opening takes half a sample at most"


def test_long_documents_are_left_out_on_request() -> None:
    found = layout(Packing("documents", "skip"), [4, 16, 33, 17, 10])
    assert pieces(found) == [[(0, 0, 4, 0), (4, 0, 10, 0)], [(1, 0, 16, 0)]]
    assert found.long == LongDocuments(left_out=2)


def test_a_stream_loses_a_place_where_a_begin_token_is_added() -> None:
    assert pieces(layout(Packing("stream", "cut", True), [20, 11, 40]))[:4] == [
        [(0, 0, 16, 0)],
        [(0, 16, 20, 0), (1, 0, 11, 0)],
        [(2, 0, 16, 0)],
        [(2, 16, 31, 0)],
    ]


@pytest.mark.parametrize(
    ("asked", "way", "words"),
    [
        (("auto", "split", True, False), "documents", "documents, long split"),
        (("auto", "split", False, False), "stream", ""),
        (("auto", "split", False, True), "stream", "stream, long cut, begin token"),
        ((True, "split", True, False), "stream", ""),
        ((False, "split", False, False), "none", ""),
        ((False, "split", True, False), "none", "none, long split"),
        (("documents", "skip", False, False), "documents", "documents, long skip"),
    ],
)
def test_the_packing_that_is_asked_for(asked: tuple, way: str, words: str) -> None:
    pack, long, conversations, begin = asked
    found = Packing.of(pack, long, conversations=conversations, begin=begin)
    assert (found.way, found.words) == (way, words)
    assert Packing.parse(found.words, found.shares) == found


@pytest.mark.parametrize("pack", [True, False])
def test_a_cache_of_an_earlier_release_keeps_its_packing(pack: bool) -> None:
    """Its manifest has no words; conversations were cut, and nothing began with a token of its own."""
    begun = Packing.parse("", pack)
    for asked in ("auto", pack):
        assert Packing.of(asked, "split", conversations=True, begin=True, begun=begun) == begun
        assert begun.asked(asked, "split") == begun
    assert Packing.of("documents", "split", conversations=True, begin=True, begun=begun).words
    with pytest.raises(UserError, match="sideways"):
        Packing.parse("sideways", pack)


def test_a_stream_cannot_leave_out_what_is_long() -> None:
    with pytest.raises(UserError, match="pack documents"):
        Packing.of("auto", "skip", conversations=False, begin=False)
