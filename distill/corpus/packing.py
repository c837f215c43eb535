"""Packing: the choice of how documents become samples, in words for a cache's identity."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from distill.errors import UserError

Way = Literal["documents", "stream", "none"]
Long = Literal["split", "skip", "cut"]


@dataclass(frozen=True)
class Packing:
    """A way from documents to samples."""

    way: Way
    """`documents`: whole ones by best fit; `stream`: one behind the other, cut every L tokens; `none`: one a sample."""
    long: Long = "cut"
    """Documents longer than a sample, but for a stream: split at turns with the first turns repeated, left out, or (in
    caches of earlier releases, and where there are no turns) cut."""
    begin: bool = False
    """Put the tokenizer's first token in front of what begins inside a document."""

    @classmethod
    def of(
        cls, pack: bool | str, long: str, *, conversations: bool, begin: bool, begun: Packing | None = None
    ) -> Packing:
        """Return the packing that the configuration's `corpus.pack` and `corpus.long` ask for.

        Args:
            conversations: the corpus holds conversations.
            begin: the tokenizer begins a plain text with a token of its own.
            begun: the packing of a cache that was begun, which `auto` follows, and whose way stays what it was.
        """
        way = way_of(pack)
        if way == "auto":
            way = begun.way if begun else "documents" if conversations else "stream"
        if way == "stream" and long == "skip":
            raise UserError(
                "corpus.long: skip leaves out documents that are longer than a sample, and a stream has none: give "
                "--corpus.pack documents"
            )
        if way == "stream" or (way == "none" and long == "split" and not conversations):
            long = "cut"
        found = cls(way, long, begin)  # type: ignore[arg-type]
        return found.like(begun) if begun else found

    def asked(self, pack: bool | str, long: str) -> Packing:
        """Return this packing of a cache with what the configuration asks for otherwise."""
        way = self.way if way_of(pack) == "auto" else way_of(pack)
        if way == "stream":
            long = "cut"
        elif long == "split" and self.long == "cut":
            long = self.long
        return replace(self, way=way, long=long)  # type: ignore[arg-type]

    def like(self, begun: Packing) -> Packing:
        """Return the packing as a cache of the same way has it that an earlier release began."""
        if begun.way != self.way:
            return self
        is_cut = begun.long == "cut" and self.long == "split"
        return replace(self, begin=begun.begin, long="cut" if is_cut else self.long)

    @property
    def shares(self) -> bool:
        """True if several documents may share a sample."""
        return self.way != "none"

    @property
    def words(self) -> str:
        """The packing in words; empty for that of earlier releases, which a manifest's `pack` tells."""
        if self.way != "documents" and self.long == "cut" and not self.begin:
            return ""
        return f"{self.way}, long {self.long}{', begin token' if self.begin else ''}"

    @classmethod
    def parse(cls, words: str, pack: bool) -> Packing:
        """Return the packing of a manifest. Raises UserError for words that this release does not know."""
        if not words:
            return cls("stream" if pack else "none")
        known = {
            packing.words: packing
            for way in ("documents", "stream", "none")
            for long in ("split", "skip", "cut")
            for begin in (False, True)
            if (packing := cls(way, long, begin)).words
        }
        if words not in known:
            raise UserError(
                f"the cache's samples are '{words}', which this release does not know: take the one that made it"
            )
        return known[words]


STREAM = Packing("stream")


def way_of(pack: bool | str) -> str:
    """Return the way that a value of `corpus.pack` names; true and false are its earlier values."""
    return {True: "stream", False: "none"}[pack] if isinstance(pack, bool) else pack
