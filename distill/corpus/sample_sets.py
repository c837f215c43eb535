"""A corpus as samples: two sets that share no document, and what is to be told of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import datasets
import numpy as np

from distill.corpus.gathering import Gathered, Gatherer
from distill.corpus.layout import LongDocuments
from distill.corpus.packing import STREAM, Packing
from distill.corpus.samples import Samples
from distill.corpus.sampling import Sampling
from distill.corpus.shapes import NAMES
from distill.corpus.summary import SourceCounts
from distill.errors import UserError

READING, REVISION = "reading", "revision"
"""Keys of the facts that a stream's samples depend on beside its files: the windows, and the commit of a data set."""


@dataclass(frozen=True)
class SampleSets:
    """A corpus as samples, in two sets that share no document."""

    train: Samples | Gathered
    """Samples to train on. Their documents are shuffled."""
    held_out: Samples | Gathered
    """Samples that are never trained on, with their documents in file order. Empty if none were asked for."""
    fingerprint: str
    """The sha256 (hex) of the documents' content in file order, before tokenising: the same for every tokenizer."""
    counts: tuple[SourceCounts, ...] = ()
    """Counts of each source: what was read, and what was left out."""
    sources: tuple[str, ...] = ()
    """Names of the files (below the corpus's folder) or of the data set, by the number that samples give."""
    owners: tuple[int, ...] = ()
    """Number of the source (in `counts`) of each of these files."""
    shapes: dict[str, int] = field(default_factory=dict)
    """Number of rows of each shape (`distill.corpus.shapes.NAMES`)."""
    thoughts_left_out: int = 0
    """Thoughts of earlier turns that the chat template takes out by its own rule."""
    endless: int = 0
    """Conversations whose last learned answer ends without an end-of-turn token."""
    rendering: dict[str, str] = field(default_factory=dict)
    """Settings that the text of conversations depends on beside the tokenizer, in words; empty at the defaults."""
    packing: Packing = STREAM
    """Way from documents to samples."""
    is_conversations: bool = False
    """True if the documents are conversations, false if they are plain texts."""
    texts: Callable[[], Iterator[str]] = lambda: iter(())
    """Function that reads the texts of the training documents: plain texts, and the contents of messages."""
    written: tuple[str, ...] = ()
    """Lines about the folders of texts that a model wrote."""
    gatherer: Gatherer | None = None
    """The reading of a stream, of which a part is read; None for a corpus that is read whole."""

    def ahead(self) -> contextlib.AbstractContextManager[None]:
        """Read what is still needed of a stream in a thread, inside."""
        return contextlib.nullcontext() if self.gatherer is None else self.gatherer.ahead()

    @property
    def endless_in_words(self) -> str:
        """Warning about answers without an end, in one line; empty where all have one."""
        if not self.endless:
            return ""
        return (
            f"the last answers of {self.endless:,} conversations are learned without an end-of-turn token, so the "
            "student may not learn to stop: mend the chat template, or name another file with corpus.chat_template"
        )

    @property
    def long_documents(self) -> str:
        """The documents longer than a sample, counted in words. Empty without one, and for a stream that is cut."""
        long = LongDocuments.together((self.train.long, self.held_out.long))
        return "" if self.packing.way == "stream" else str(long)


def check_samples(path: str, rows: tuple[int, int], samples: tuple[int, int], sampling: Sampling) -> None:
    """Raise UserError if a side has documents, but no sample."""
    for documents, count, side in zip(rows, samples, ("training", "held-out"), strict=True):
        if documents and not count:
            raise UserError(
                f"{path}: all {documents} {side} documents are longer than {sampling.sequence_length} tokens, and "
                "corpus.long: skip leaves them out: raise corpus.sequence_length, or give --corpus.long split"
            )


def shapes_of(documents: datasets.Dataset) -> dict[str, int]:
    kinds = np.unique(numbers(documents, "shape"), return_counts=True)
    return {NAMES[kind]: int(rows) for kind, rows in zip(*kinds, strict=True) if kind >= 0}


def numbers(table: datasets.Dataset, column: str) -> np.ndarray:
    return table.data.column(column).to_numpy()
