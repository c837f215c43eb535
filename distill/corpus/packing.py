"""Samples: the documents' tokens, cut into rows of one length and read from disk on request.

Shapes: L sequence length.
"""

from __future__ import annotations

import datasets
import numpy as np
import pyarrow.compute
import torch
from torch import Tensor


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A map-style data set of samples; `samples[i]` is a dict of tensors of length L:

    * `input_ids` int64: tokens, padded on the right if a sample is short
    * `position_ids` int64: from 0 at each sample's start, at each document's start, and at the padding's start
    * `loss_mask` bool: True where the next token (of the same document and sample) is to be learned
    * `document_hash` int64: the first 8 bytes of the sha256 of the position's document, little-endian; 0 in padding
    * `source` int64: the number of the position's source; 0 in padding

    With `pack`, the documents form one stream that is cut every L tokens, so only the last sample may be short.
    Without it, each document is cut by itself into ceil(length / L) samples. No token is lost or doubled: the unpadded
    tokens of all samples, one after another, are the documents, one after another.

    A sample may carry no loss at all (the middle of a long question; one last token). It keeps its place, so that the
    numbering depends on nothing but the documents' lengths. Sums over positions with loss are right with it.

    Memory holds 28 bytes a document (36 without `pack`). The tokens stay in the memory-mapped table.
    """

    def __init__(
        self,
        encoded: datasets.Dataset,
        rows: np.ndarray,
        *,
        hashes: np.ndarray,
        sources: np.ndarray,
        sequence_length: int,
        pack: bool,
        pad_token_id: int,
    ) -> None:
        """Take the documents in `rows` of `encoded`; `hashes` (int64) and `sources` are those of all its rows."""
        lengths = document_lengths(encoded)[rows]
        assert np.all(lengths > 0), "empty documents have no place in a sample"
        self.sequence_length = sequence_length
        """Tokens a sample, padding included."""
        self.pad_token_id = pad_token_id
        self._encoded = encoded.select_columns(["input_ids", "loss_mask"]).with_format("arrow")
        self._rows, self._hashes, self._sources = rows, hashes[rows], sources[rows].astype(np.int32)
        self._begins = np.concatenate([[0], np.cumsum(lengths)])  # each document's first token in the stream
        # Only without packing: the number of each document's first sample.
        self._first_samples = None if pack else np.concatenate([[0], np.cumsum(-(-lengths // sequence_length))])

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self._rows)

    @property
    def tokens(self) -> int:
        """Number of tokens, without padding."""
        return int(self._begins[-1])

    def __len__(self) -> int:
        if self._first_samples is not None:
            return int(self._first_samples[-1])
        return -(-self.tokens // self.sequence_length)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        begin, end = self._stream_span(index % len(self))
        ids_L = np.full(self.sequence_length, self.pad_token_id, dtype=np.int64)
        positions_L = np.empty(self.sequence_length, dtype=np.int64)
        mask_L = np.zeros(self.sequence_length, dtype=bool)
        hash_L, source_L = (np.zeros(self.sequence_length, dtype=np.int64) for _ in range(2))
        document = int(np.searchsorted(self._begins, begin, side="right")) - 1
        filled = 0
        while begin < end:
            stop = min(end, int(self._begins[document + 1]))
            places = slice(filled, filled + stop - begin)
            ids_L[places], mask_L[places] = self._read(document, begin, stop)
            positions_L[places] = np.arange(stop - begin)
            hash_L[places], source_L[places] = self._hashes[document], self._sources[document]
            mask_L[places.stop - 1] = False  # the next token is in another sample or belongs to another document
            filled, begin, document = places.stop, stop, document + 1
        positions_L[filled:] = np.arange(self.sequence_length - filled)
        return {
            "input_ids": torch.from_numpy(ids_L),
            "position_ids": torch.from_numpy(positions_L),
            "loss_mask": torch.from_numpy(mask_L),
            "document_hash": torch.from_numpy(hash_L),
            "source": torch.from_numpy(source_L),
        }

    def _stream_span(self, index: int) -> tuple[int, int]:
        """Return the place of a sample's first token in the stream of all documents, and the place after its last."""
        if self._first_samples is None:
            begin = index * self.sequence_length
            return begin, min(begin + self.sequence_length, self.tokens)
        document = int(np.searchsorted(self._first_samples, index, side="right")) - 1
        begin = int(self._begins[document]) + (index - int(self._first_samples[document])) * self.sequence_length
        return begin, min(begin + self.sequence_length, int(self._begins[document + 1]))

    def _read(self, document: int, begin: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and loss mask of a slice of a document. Only that slice is read from disk."""
        row = self._encoded[int(self._rows[document])]  # one row, so one chunk a column: views of the file, no copy
        start = begin - int(self._begins[document])
        ids, mask = (
            row.column(name).chunk(0).flatten().slice(start, stop - begin).to_numpy(zero_copy_only=False)
            for name in ("input_ids", "loss_mask")
        )
        return ids, mask


def document_lengths(encoded: datasets.Dataset) -> np.ndarray:
    """Return the number of tokens (int64) in each row of the table that `encode` makes."""
    column = encoded.select_columns(["input_ids"]).data.column("input_ids")
    return pyarrow.compute.list_value_length(column).to_numpy().astype(np.int64)
