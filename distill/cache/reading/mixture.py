"""Several caches of one teacher read as one: in each epoch a share of the samples comes from each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distill.cache.format.folder import Manifest
from distill.cache.format.records import Record
from distill.cache.reading.batches import Batch
from distill.cache.reading.reader import CacheReader
from distill.errors import UserError
from distill.models.language_model import Head

_OF_THE_SAME = ("scheme", "scheme_parameters", "temperature", "vocab_size", "sequence_length")
"""Values of a manifest that caches in one training share."""
_FINGERPRINTS = ("teacher_config", "teacher_weights", "quantization", "tokenizer", "teacher_class")


class MixedReader:
    """The training samples of several caches, one cache after another.

    An epoch has as many samples as all of them together. A cache with the share `w` of the weights fills that share of
    it. A cache that has fewer samples is begun again within the epoch, in another order; one that has more goes on in
    the next epoch where this one ended: between two readings of a sample its whole cache is read.
    """

    def __init__(self, readers: Sequence[CacheReader], weights: Sequence[float]) -> None:
        """Take readers of one split. Raises UserError for caches that cannot be learned together."""
        self.readers, first = list(readers), readers[0]
        self.storage, self.manifest, self.scheme, self.used = first.storage, first.manifest, first.scheme, first.used
        for reader in self.readers[1:]:
            check_alike(first.manifest, reader.manifest, reader.storage.name, first.storage.name)
        self._sizes = [len(reader) for reader in self.readers]
        self._begins = np.concatenate([[0], np.cumsum(self._sizes)])
        self.counts = _shares(len(self), weights)
        """Samples of an epoch from each cache."""
        for reader, count in zip(self.readers, self.counts, strict=True):
            if not count or not len(reader):
                raise UserError(f"train.caches: {reader.storage.name} has no sample in an epoch: raise its weight")
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self._begins[-1])

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._begins, index, side="right")) - 1
        return self.readers[number][index - int(self._begins[number])]

    @property
    def teacher_head(self) -> Head | None:
        """The teacher's head from caches of hidden states; None for others. All caches are of one teacher."""
        return self.readers[0].teacher_head

    def collate(self, records: list[Record]) -> Batch:
        """Join records to one batch."""
        return self.readers[0].collate(records)

    def places(self, places: NDArray[np.int64], epoch: int) -> list[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """Return the parts of an epoch's places (0 … len - 1) by cache.

        Each is the cache's number, where its places stand among those given, and how many of its samples come before
        each of them, earlier epochs counted.
        """
        owners = np.searchsorted(self._ends, places, side="right")
        found = []
        for number, count in enumerate(self.counts):
            here = np.flatnonzero(owners == number)
            found.append((number, here, epoch * count + places[here] - (int(self._ends[number]) - count)))
        return found

    def sample(self, number: int, within: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers here of a cache's samples."""
        return within + int(self._begins[number])

    def size(self, number: int) -> int:
        """Return the number of a cache's samples."""
        return self._sizes[number]


def check_alike(first: Manifest, other: Manifest, name: str, first_name: str) -> None:
    """Raise UserError for a cache of another teacher, tokenizer, scheme or sample length than the first."""
    pairs = {key: (getattr(first, key), getattr(other, key)) for key in _OF_THE_SAME}
    pairs |= {key: (first.fingerprints.get(key), other.fingerprints.get(key)) for key in _FINGERPRINTS}
    different = [
        f"{key}: {_short(theirs)}, not {_short(ours)}" for key, (ours, theirs) in pairs.items() if ours != theirs
    ]
    if different:
        raise UserError(f"train.caches: {name} cannot be mixed with {first_name} ({'; '.join(different)})")


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:8]}…" if len(text) >= 40 else text


def _shares(total: int, weights: Sequence[float]) -> list[int]:
    """Return whole numbers in the proportion of the weights that sum to `total`, by the largest remainders."""
    exact = np.array(weights) / sum(weights) * total
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]
    counts[largest] += 1
    return counts.tolist()
