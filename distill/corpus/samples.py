"""Samples: rows of one length made of pieces of documents, whose tokens are read from disk on request.

Shapes: L sequence length.
"""

from __future__ import annotations

import datasets
import numpy as np
import pyarrow.compute
import torch
from torch import Tensor

from distill.corpus.layout import Layout, LongDocuments
from distill.corpus.packing import Packing


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A map-style data set of samples; `samples[i]` is a dict of tensors of length L:

    * `input_ids` int64: tokens, padded on the right if a sample is short
    * `position_ids` int64: from 0 at each piece of a document, and at the padding's start
    * `loss_mask` bool: True where the next token (of the same piece) is to be learned
    * `document_hash` int64: the first 8 bytes of the sha256 of the position's document, little-endian; 0 in padding
    * `source` int64: the number of the position's source; 0 in padding

    `Layout` says which pieces of documents are in a sample. In front of a piece that begins inside its document stand
    the document's first turns again, or the token with which the tokenizer begins a text; neither is learned.

    A sample may carry no loss at all (the middle of a long question; one last token). It keeps its place, so that the
    numbering depends on nothing but the documents' lengths and turns. Sums over positions with loss are right with it.

    Memory holds 20 bytes a document and 40 bytes a piece. The tokens stay in the memory-mapped table.
    """

    def __init__(
        self,
        encoded: datasets.Dataset,
        rows: np.ndarray,
        *,
        hashes: np.ndarray,
        sources: np.ndarray,
        sequence_length: int,
        packing: Packing,
        pad_token_id: int,
        begin_token_id: int | None = None,
    ) -> None:
        """Take the documents in `rows` of `encoded`; `hashes` (int64) and `sources` are those of all its rows."""
        lengths = document_lengths(encoded)[rows]
        assert np.all(lengths > 0), "empty documents have no place in a sample"
        assert begin_token_id is not None or not packing.begin
        self.sequence_length = sequence_length
        """Tokens a sample, padding included."""
        self.pad_token_id = pad_token_id
        self._begin_token_id = begin_token_id if packing.begin else None
        self._encoded = encoded.select_columns(["input_ids", "loss_mask"]).with_format("arrow")
        self._rows, self._hashes, self._sources = rows, hashes[rows], sources[rows].astype(np.int32)
        turns = encoded.select_columns(["turns", "openings"])

        def turns_of(document: int) -> tuple[list[int], list[int]]:
            row = turns[int(rows[document])]
            return row["turns"], row["openings"]

        self.layout = Layout.of(packing, lengths, sequence_length, turns_of)
        """The pieces of documents in each sample."""
        self.documents = len(rows) - self.layout.long.left_out
        """Number of documents."""
        self.tokens = int((self.layout.ends - self.layout.begins).sum())
        """Number of the documents' tokens, each counted once."""

    @property
    def long(self) -> LongDocuments:
        """Number of documents longer than a sample."""
        return self.layout.long

    def __len__(self) -> int:
        return len(self.layout.firsts) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        layout = self.layout
        ids_L = np.full(self.sequence_length, self.pad_token_id, dtype=np.int64)
        positions_L = np.empty(self.sequence_length, dtype=np.int64)
        mask_L = np.zeros(self.sequence_length, dtype=bool)
        hash_L, source_L = (np.zeros(self.sequence_length, dtype=np.int64) for _ in range(2))
        start = 0
        for piece in range(*layout.firsts[index % len(self) :][:2].tolist()):
            document, begin, end, opening = (
                int(column[piece]) for column in (layout.documents, layout.begins, layout.ends, layout.openings)
            )
            at = start
            if opening:
                ids_L[at : at + opening] = self._read(document, 0, opening)[0]
                at += opening
            elif begin and self._begin_token_id is not None:
                ids_L[at] = self._begin_token_id
                at += 1
            stop = at + end - begin
            ids_L[at:stop], mask_L[at:stop] = self._read(document, begin, end)
            mask_L[stop - 1] = False  # the next token is in another sample or belongs to another document
            positions_L[start:stop] = np.arange(stop - start)
            hash_L[start:stop], source_L[start:stop] = self._hashes[document], self._sources[document]
            start = stop
        positions_L[start:] = np.arange(self.sequence_length - start)
        return {
            "input_ids": torch.from_numpy(ids_L),
            "position_ids": torch.from_numpy(positions_L),
            "loss_mask": torch.from_numpy(mask_L),
            "document_hash": torch.from_numpy(hash_L),
            "source": torch.from_numpy(source_L),
        }

    def _read(self, document: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and loss mask of a slice of a document. Only that slice is read from disk."""
        row = self._encoded[int(self._rows[document])]  # one row, so one chunk a column: views of the file, no copy
        ids, mask = (
            row.column(name).chunk(0).flatten().slice(begin, end - begin).to_numpy(zero_copy_only=False)
            for name in ("input_ids", "loss_mask")
        )
        return ids, mask


def document_lengths(encoded: datasets.Dataset) -> np.ndarray:
    """Return the number of tokens (int64) in each row of the table that `encode` makes."""
    column = encoded.select_columns(["input_ids"]).data.column("input_ids")
    return pyarrow.compute.list_value_length(column).to_numpy().astype(np.int64)
