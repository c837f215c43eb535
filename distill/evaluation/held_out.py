"""The held-out samples that an evaluation reads: their documents, sources and bytes of text.

It is apart from the walk over them (`fidelity`), whose imports take seconds that a finished evaluation does not need.
Shapes: L sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerBase

from distill.models.vocabulary import Vocabulary


@dataclass(frozen=True)
class Sources:
    """Sources of the text, each of which is measured apart too."""

    names: tuple[str, ...]
    owners_F: Tensor
    """Number of the source of each of the F files (int64), which samples name by number."""


def documents_of(samples: Dataset) -> Tensor:
    """Return the hashes of the documents that positions with loss come from, sorted."""
    found = [sample["document_hash"][sample["loss_mask"]] for sample in _each(samples)]
    return torch.cat([torch.empty(0, dtype=torch.int64), *found]).unique()


def _each(samples: Dataset) -> Iterator[dict[str, Tensor]]:
    return (samples[index] for index in range(len(samples)))  # type: ignore[arg-type]


def text_bytes(samples: Dataset, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the UTF-8 bytes of the text that the positions with loss predict, for bits per byte.

    A run of neighbouring positions with loss ends with its document. It is decoded together with the token at its
    beginning, whose own text is subtracted again, because SentencePiece drops a space at the beginning of a text.
    Special tokens have no text, but their likelihood counts, so bits per byte err to the high side by a token a
    document or turn. The number is approximate if a run begins or ends inside a character: the fragment counts as the
    replacement character's 3 bytes.
    """

    def length(ids: Tensor) -> int:
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(str(text).encode("utf-8", "replace"))

    total = 0
    for sample in _each(samples):
        ids_L = sample["input_ids"]
        for begin, end in _runs(sample["loss_mask"]):
            total += length(ids_L[begin : end + 1]) - length(ids_L[begin : begin + 1])
    return total


def _runs(loss_mask_L: Tensor) -> list[tuple[int, int]]:
    """Return the first place of each run of positions with loss, and the place after its last."""
    padded = torch.nn.functional.pad(loss_mask_L.to(torch.int8), (1, 1))
    edges = padded.diff().nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def covered(samples: Subset, vocabulary: Vocabulary) -> Subset:
    """Return the samples that consist of the vocabulary's tokens alone."""
    fine = [index for index in range(len(samples)) if vocabulary.covers(samples[index]["input_ids"])]
    return Subset(samples, fine)
