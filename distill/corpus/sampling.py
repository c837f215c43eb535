"""The way from tables of documents and tokens to the samples of both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.corpus.documents import document_hashes
from distill.corpus.packing import Packing
from distill.corpus.samples import Samples
from distill.corpus.splitting import split_rows
from distill.models.tokenizers import begin_token_id


@dataclass(frozen=True)
class Sampling:
    """The settings between tables and samples."""

    tokenizer: PreTrainedTokenizerBase
    sequence_length: int
    pack: bool | str
    long: str
    begun: Packing | None
    held_out: float

    def packing(self, conversations: bool) -> Packing:
        """Return the packing of a corpus of conversations, or of plain text."""
        begin = begin_token_id(self.tokenizer) is not None
        return Packing.of(self.pack, self.long, conversations=conversations, begin=begin, begun=self.begun)

    def rows(
        self, documents: datasets.Dataset, kept: np.ndarray, learnable: np.ndarray, seed: int | Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of the training and of the held-out documents that are kept and have a token to learn."""
        shares = documents.data.column("share").to_numpy()
        train, held_out = split_rows(np.where(kept, shares, 2.0), self.held_out, seed)
        return train[learnable[train]], held_out[learnable[held_out]]

    def samples(
        self, documents: datasets.Dataset, encoded: datasets.Dataset, rows: np.ndarray, packing: Packing
    ) -> Samples:
        """Return the documents in `rows` as samples."""
        return Samples(
            encoded,
            rows,
            hashes=document_hashes(documents),
            sources=documents.data.column("source").to_numpy(),
            sequence_length=self.sequence_length,
            packing=packing,
            pad_token_id=_pad_token_id(self.tokenizer),
            begin_token_id=begin_token_id(self.tokenizer),
        )


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that fills a short sample. It is never learned; its positions isolate it from the text."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)
