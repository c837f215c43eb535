"""The choice of the documents that are kept: no bad rows, no empty ones, none that was there before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import datasets
import numpy as np

from distill.corpus.documents import (
    are_conversations,
    corpus_fingerprint,
    document_hashes,
    faults_in,
    find_duplicates,
)
from distill.corpus.faults import Fault, count_kinds, refusal
from distill.corpus.samples import document_lengths
from distill.corpus.summary import BEYOND, DUPLICATE, EMPTY, LONG, UNLEARNABLE, SourceCounts, count_source
from distill.errors import UserError

BadRows = Literal["refuse", "skip"]


@dataclass(frozen=True)
class Selection:
    """Masks over the rows of a table of documents (bool), and the reasons for the others."""

    kept: np.ndarray
    """Documents that the fingerprint is of."""
    learnable: np.ndarray
    """Kept documents that have a token to learn."""
    fingerprint: str
    repeated: np.ndarray
    faults: list[Fault]

    def counts(
        self,
        names: Sequence[str],
        owners: np.ndarray,
        encoded: datasets.Dataset,
        sides: tuple[np.ndarray, np.ndarray],
        length: int,
        skips_long: bool = False,
    ) -> tuple[SourceCounts, ...]:
        """Return the counts of each source of `names`. `owners` is the source's number of each row.

        `sides` are the rows of the training and of the held-out documents; with `skips_long`, those longer than
        `length` tokens are left out.
        """
        is_taken, is_held = np.zeros((2, len(self.kept)), dtype=bool)
        is_taken[np.concatenate(sides)] = True
        is_held[sides[1]] = True
        bad = np.zeros(len(self.kept), dtype=bool)
        bad[[fault.place for fault in self.faults]] = True
        is_long = is_taken & skips_long & (document_lengths(encoded) > length)
        is_taken &= ~is_long
        lengths, learned = document_lengths(encoded), encoded.data.column("learned").to_numpy()
        found = []
        for number, name in enumerate(names):
            here = owners == number
            own = here & is_taken
            left_out = count_kinds(fault for fault in self.faults if here[fault.place]) | {
                EMPTY: int((here & ~self.kept & ~self.repeated & ~bad).sum()),
                UNLEARNABLE: int((here & self.kept & ~self.learnable).sum()),
                DUPLICATE: int((here & self.repeated).sum()),
                BEYOND: int((here & self.learnable & ~is_taken & ~is_long).sum()),
                LONG: int((here & is_long).sum()),
            }
            found.append(count_source(name, lengths[own], learned[own], is_held[own], left_out, length))
        return tuple(found)


def check_reading(
    path: str, documents: datasets.Dataset, labels: Sequence[str], bad_rows: BadRows, is_whole: bool = True
) -> None:
    """Raise UserError for documents of which none is left, and for bad rows that are all known before rendering.

    If the documents are not the whole corpus, others may be left.
    """
    faults, empty = faults_in(documents, documents), int((documents.data.column("share").to_numpy() > 1).sum())
    all_known = bad_rows == "refuse" and not are_conversations(documents)
    if (is_whole and len(faults) == len(documents)) or (faults and all_known):
        raise refusal(faults, len(documents), labels)
    if is_whole and empty == len(documents):
        raise UserError(f"{path}: no document with any text in it ({empty - len(faults)} empty ones)")


def select(
    path: str,
    documents: datasets.Dataset,
    encoded: datasets.Dataset,
    labels: Sequence[str],
    bad_rows: BadRows,
    begun_with: str | None,
    before: np.ndarray | None = None,
) -> Selection:
    """Choose among documents. Raises UserError for bad rows, unless they are skipped, and if nothing can be learned.

    Of documents with the same content the first one is kept. A cache of a release that kept all of them goes on with
    all of them: one that was `begun_with` their fingerprint.

    `before` are the hashes of the documents that were read before, if these are a window of a corpus.
    """
    faults = faults_in(documents, documents) + faults_in(encoded, documents)
    is_whole = before is None
    if faults and (bad_rows == "refuse" or (is_whole and len(faults) == len(documents))):
        raise refusal(faults, len(documents), labels)
    whole = documents.data.column("share").to_numpy() <= 1
    whole[[fault.place for fault in faults]] = False
    repeated = find_duplicates(document_hashes(documents), whole)
    if before is not None:
        repeated |= whole & np.isin(document_hashes(documents), before)
    fingerprint = corpus_fingerprint(documents, whole & ~repeated)
    if begun_with not in (None, fingerprint) and begun_with == corpus_fingerprint(documents, whole):
        fingerprint, repeated = begun_with, np.zeros_like(repeated)
    kept = whole & ~repeated
    learnable = kept & (encoded.data.column("learned").to_numpy() > 0)
    if is_whole and not learnable.any():
        lacking = "an answer of the assistant" if are_conversations(documents) else "a second token"
        raise UserError(f"{path}: nothing to learn: none of the {kept.sum()} documents has {lacking}")
    return Selection(kept, learnable, fingerprint, repeated, faults)
