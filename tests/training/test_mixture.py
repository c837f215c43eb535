"""Several caches in one training: each epoch has their shares, every sample its turn, and a resumed one goes on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from distill.cache.reading.mixture import MixedReader
from distill.errors import UserError
from distill.training.data import EpochPermutation

SIZES = (10, 4, 7)
BEGINS = (0, 10, 14, 21)


@dataclass
class Reader:
    """A stand-in for a cache: sample i is a pair of its name and i."""

    name: str
    size: int
    manifest: Any = field(
        default_factory=lambda: SimpleNamespace(
            scheme="varopt", scheme_parameters={}, temperature=1, vocab_size=9, sequence_length=8, fingerprints={}
        )
    )
    scheme = used = None

    @property
    def storage(self) -> Any:
        return SimpleNamespace(name=self.name)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[str, int]:
        assert 0 <= index < self.size
        return self.name, index


def mixed(*weights: float) -> MixedReader:
    readers: Any = [Reader(name, size) for name, size in zip("abc", SIZES, strict=True)]
    return MixedReader(readers, weights)


def epoch_of(mixture: MixedReader, epoch: int, seen: int = 0, **how: int) -> list[int]:
    order = EpochPermutation(len(mixture), 5, epoch, seen, mixture=mixture, **how)
    order.set_epoch(epoch)
    return list(order)


def test_an_epoch_has_each_caches_share_and_none_waits_for_ever() -> None:
    mixture = mixed(1, 2, 4)
    assert len(mixture) == 21 and mixture.counts == [3, 6, 12]
    times: Counter[Any] = Counter()
    for epoch in range(20):
        found = Counter(mixture[index] for index in epoch_of(mixture, epoch))
        assert Counter(name for name, _ in found.elements()) == {"a": 3, "b": 6, "c": 12}
        times += found
    for name, size, count in zip("abc", SIZES, mixture.counts, strict=True):
        seen = [times[name, sample] for sample in range(size)]
        assert sum(seen) == 20 * count and max(seen) - min(seen) <= 1, "its whole cache lies between two readings"


def test_equal_shares_read_each_sample_once_an_epoch() -> None:
    mixture = mixed(*SIZES)
    orders = [epoch_of(mixture, epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(21)) for order in orders) and orders[0] != orders[1]


def test_a_resumed_epoch_and_several_processes_have_the_same_samples() -> None:
    mixture = mixed(1, 1, 3)
    whole = epoch_of(mixture, 4)
    assert epoch_of(mixture, 4, seen=6, batch_size=3) == whole[6:]
    parts = [epoch_of(mixture, 4, batch_size=3, rank=rank, world=2) for rank in range(2)]
    assert sorted(index for part in parts for index in part if index >= 0) == sorted(whole)


def test_caches_that_cannot_be_learned_together_are_refused() -> None:
    other = SimpleNamespace(**{**vars(Reader("a", 1).manifest), "temperature": 2, "fingerprints": {"tokenizer": "x"}})
    readers: Any = [Reader("first", 3), Reader("second", 3, other)]
    with pytest.raises(UserError, match=r"second cannot be mixed with first .temperature: 2, not 1; tokenizer: x"):
        MixedReader(readers, [1, 1])
    with pytest.raises(UserError, match="a has no sample in an epoch: raise its weight"):
        mixed(0.001, 1, 1)
