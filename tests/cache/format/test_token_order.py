"""The order of the tokens: written and read it is the same, and what it relabels comes back."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distill.cache.format.arrays import DamagedRecord, compress, write_sizes
from distill.cache.format.folder import TOKEN_ORDER, Manifest
from distill.cache.format.records import Record, encode
from distill.cache.format.token_order import FINGERPRINT, TokenOrder, save_order, token_counts
from distill.cache.making.extract import extract
from distill.cache.making.writer import CacheWriter
from distill.cache.reading.reader import CacheReader
from distill.errors import UserError
from distill.models.language_model import Head
from distill.targets import schemes
from distill.targets.sparse import SparseTargets

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 1009
SCHEMES = {
    "varopt": schemes.VarOpt(0.05),
    "top_k": schemes.TopK(12),
    "random": schemes.RandomDraws(20),
    "hidden": schemes.Hidden(5),
}


def shuffled(vocab_size: int, seed: int, first: int | None = None) -> TokenOrder:
    """A random order; with `first`, only so many tokens are drawn, the others follow by id."""
    tokens_V = np.random.default_rng(seed).permutation(vocab_size).astype(np.uint32)
    if first is not None:
        tokens_V = np.concatenate([tokens_V[:first], np.sort(tokens_V[first:])])
    return TokenOrder(tokens_V)


# The file.


def back(order: TokenOrder) -> TokenOrder:
    return TokenOrder.from_bytes(order.to_bytes(), len(order.tokens_V))


@given(st.integers(1, 60).flatmap(lambda size: st.permutations(range(size))))
@example([0])
@example([1, 0])
@example([0, 2, 1])
@settings(max_examples=150, deadline=None)
def test_any_order_comes_back(tokens: list[int]) -> None:
    order = TokenOrder(np.array(tokens, dtype=np.uint32))
    again = back(order)
    np.testing.assert_array_equal(again.tokens_V, order.tokens_V, strict=True)
    assert again.fingerprint == order.fingerprint
    assert order.is_by_id == (tokens == sorted(tokens))
    assert order.ranks_V[order.tokens_V].tolist() == order.tokens_V[order.ranks_V].tolist() == [*range(len(tokens))]


@pytest.mark.parametrize("first", [0, 5000, None])
def test_large_vocabularies(first: int | None) -> None:
    order = shuffled(2**18, seed=1, first=first)
    np.testing.assert_array_equal(back(order).tokens_V, order.tokens_V, strict=True)
    # What is by id anyway takes no bytes; a token that is not takes its 18 bits.
    drawn = 2**18 if first is None else first
    assert len(order.to_bytes()) <= 8 + 1.05 * drawn * 18 / 8


def test_orders_that_differ_have_different_fingerprints() -> None:
    assert len({shuffled(50, seed).fingerprint for seed in range(100)}) == 100


GOOD = shuffled(VOCABULARY, seed=2, first=100).to_bytes()
IDS = np.random.default_rng(0).permutation(10).astype(np.uint32)
MALFORMED = {
    "empty": b"",
    "a size without an end": b"\xff" * 20,
    "more tokens than the vocabulary": write_sizes([VOCABULARY + 1])
    + compress(np.arange(VOCABULARY + 1, dtype=np.uint32)),
    "an absurd size": write_sizes([2**55]),
    "a size and no tokens": write_sizes([VOCABULARY]),
    "a token twice": write_sizes([10]) + compress(np.minimum(IDS, 8).astype(np.uint32)),
    "a token beyond": write_sizes([10]) + compress((IDS + VOCABULARY - 9).astype(np.uint32)),
    "fewer tokens than said": write_sizes([11]) + compress(IDS),
    "cut off": GOOD[:-1],
    "bytes where no token is": write_sizes([0]) + b"\0",
    "other numbers": write_sizes([10]) + compress(IDS.astype(np.uint16)),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_bytes_are_damage_and_take_no_memory(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DamagedRecord):
            TokenOrder.from_bytes(data, VOCABULARY)
        assert tracemalloc.get_traced_memory()[1] < 2**18
    finally:
        tracemalloc.stop()


@given(data=st.one_of(st.binary(max_size=40), st.integers(0, 8 * len(GOOD) - 1)))
@settings(max_examples=300, deadline=None)
def test_changed_bytes_are_damage_or_an_order(data: bytes | int) -> None:
    """Nothing else is raised, and nothing that is no permutation is returned; the hash tells apart those that are."""
    if isinstance(data, int):
        changed = bytearray(GOOD)
        changed[data // 8] ^= 1 << data % 8
        data = bytes(changed)
    try:
        order = TokenOrder.from_bytes(data, VOCABULARY)
    except DamagedRecord:
        return
    assert np.array_equal(np.sort(order.tokens_V), np.arange(VOCABULARY))


# Frequencies.


def test_frequent_tokens_come_first_and_equally_frequent_ones_by_id() -> None:
    order = TokenOrder.by_frequency(np.array([3, 0, 7, 3, 0, 2**40, 7]))
    assert order.tokens_V.tolist() == [5, 2, 6, 0, 3, 1, 4]
    alternating = TokenOrder.by_frequency(np.arange(1000) % 2).tokens_V
    assert alternating.tolist() == [*range(1, 1000, 2), *range(0, 1000, 2)]
    assert TokenOrder.by_frequency(np.zeros(5, dtype=np.int64)).is_by_id
    assert TokenOrder.by_id(5).tokens_V.tolist() == [0, 1, 2, 3, 4] and TokenOrder.by_id(5).is_by_id
    assert not order.is_by_id


def test_tokens_count_where_they_are_learned() -> None:
    """The next token of each position with loss, of the first samples only."""
    samples: Any = [
        {"input_ids": torch.tensor([1, 2, 2, 4]), "loss_mask": torch.tensor([True, True, False, False])},
        {"input_ids": torch.tensor([4, 4, 4, 0]), "loss_mask": torch.tensor([False, True, True, False])},
        {"input_ids": torch.tensor([3, 3, 3, 3]), "loss_mask": torch.tensor([True, True, True, False])},
    ]
    assert token_counts(samples, 2, 6).tolist() == [1, 0, 2, 0, 1, 0]
    assert token_counts(samples, 0, 6).tolist() == [0] * 6


# Records.


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_ranking_and_naming_undo_each_other(scheme: Any, make_record: Callable[..., Record], assert_same: Any) -> None:
    for seed, share in [(0, 0.7), (1, 0.7), (2, 0.0), (3, 1.0)]:
        order = shuffled(VOCABULARY, seed)
        record = make_record(seed, scheme, share=share)
        assert_same(order.named(order.ranked(record)), record)
        assert_same(order.ranked(order.named(record)), record)
        by_id = TokenOrder.by_id(VOCABULARY)
        assert_same(by_id.named(by_id.ranked(record)), record)
        ranked = order.ranked(record)
        assert (ranked.input_ids_L == order.ranks_V[record.input_ids_L]).all()
        assert (ranked.input_ids_L != record.input_ids_L).any()


@pytest.mark.parametrize("name", ["varopt", "top_k"])
def test_entries_keep_their_kind_and_atoms_rise(name: str, make_record: Callable[..., Record]) -> None:
    """Exact entries keep their places, which their codes go by; atoms are the same ones, by rising number."""
    scheme, order = SCHEMES[name], shuffled(VOCABULARY, seed=8)
    record = make_record(5, scheme)
    for names_V, renamed in ((order.ranks_V, order.ranked(record)), (order.tokens_V, order.named(record))):
        before, after = cast(SparseTargets, record.targets), cast(SparseTargets, renamed.targets)
        for position, exact in enumerate(before.exact_N.tolist()):
            here = slice(position, position + 1)
            expected, found = names_V[before[here].ids_T.numpy()].tolist(), after[here].ids_T.tolist()
            assert found[:exact] == expected[:exact]
            assert found[exact:] == sorted(expected[exact:])


@pytest.mark.parametrize("by_id", [False, True])
@pytest.mark.parametrize("name", ["varopt", "top_k", "hidden"])
def test_a_number_beyond_the_vocabulary_is_damage(by_id: bool, name: str, make_record: Callable[..., Record]) -> None:
    order = TokenOrder.by_id(VOCABULARY) if by_id else shuffled(VOCABULARY, seed=4)
    record = make_record(3, SCHEMES[name])
    changed_L = record.input_ids_L.copy()
    changed_L[-1] = VOCABULARY
    broken = [replace(record, input_ids_L=changed_L)]
    if isinstance(record.targets, SparseTargets):
        ids_T = record.targets.ids_T.clone()
        ids_T[-1] = 2**32 - 1
        broken.append(replace(record, targets=replace(record.targets, ids_T=ids_T)))
    for changed in broken:
        with pytest.raises(DamagedRecord, match="beyond the vocabulary"):
            order.named(changed)


def test_tokens_as_they_are_in_languages_take_fewer_bytes() -> None:
    """Targets and texts of a teacher to whom tokens are as probable as Zipf has it, numbered without any order."""
    generator = torch.Generator().manual_seed(0)
    places_V = torch.randperm(4096, generator=generator)
    head = Head(torch.cat([-1.3 * (1 + places_V)[:, None].log(), torch.randn(4096, 7, generator=generator)], dim=1))
    samples = []
    for _ in range(8):
        hidden_LD = torch.cat([torch.ones(64, 1), torch.randn(64, 7, generator=generator) / 3], dim=1)
        said_L = torch.multinomial(head(hidden_LD).softmax(-1), 1, generator=generator)[:, 0].roll(1)
        mask_L = torch.arange(64) < 63
        samples.append({"hidden": hidden_LD, "input_ids": said_L, "loss_mask": mask_L})
    scheme = schemes.VarOpt(0.02)
    records = []
    for sample in samples:
        inputs = (sample["input_ids"], torch.arange(64), sample["loss_mask"])
        records.append(extract(sample["hidden"], head, *inputs, scheme, seed=0))
    orders = TokenOrder.by_frequency(token_counts(cast(Any, samples), 8, 4096)), TokenOrder.by_id(4096)
    ordered, by_id = (sum(len(encode(order.ranked(r), scheme)) for r in records) for order in orders)
    assert ordered < 0.97 * by_id, (ordered, by_id)


# Caches without a teacher.


@pytest.fixture
def manifest(make_manifest: Callable[..., Manifest]) -> Manifest:
    fingerprints = {**make_manifest().fingerprints, FINGERPRINT: shuffled(VOCABULARY, seed=6).fingerprint}
    return make_manifest(scheme_parameters={"threshold": 0.1}, fingerprints=fingerprints)


@pytest.fixture
def folder(manifest: Manifest, records_of: Callable[[Manifest, int], list[Record]], tmp_path: Path) -> Path:
    """A finished cache with an order."""
    writer = CacheWriter(tmp_path / "cache", manifest)
    save_order(tmp_path / "cache", shuffled(VOCABULARY, seed=6))
    for shard in range(manifest.shards):
        writer.write(shard, records_of(manifest, shard))
    return tmp_path / "cache"


def test_written_as_ranks_and_read_as_tokens(
    folder: Path, manifest: Manifest, records_of: Callable[[Manifest, int], list[Record]], assert_same: Any
) -> None:
    expected = [record for shard in range(manifest.shards) for record in records_of(manifest, shard)]
    for split in manifest.splits:
        reader = CacheReader(folder, split)
        for index, number in enumerate(manifest.split_range(split)):
            assert_same(reader[index], expected[number])


def test_a_rank_beyond_the_vocabulary_is_refused_by_the_reader(
    make_manifest: Callable[..., Manifest], records_of: Callable[[Manifest, int], list[Record]], tmp_path: Path
) -> None:
    """A cache of a smaller vocabulary than its records are of: their checksums hold, their numbers do not fit."""
    smaller = make_manifest(vocab_size=50)
    writer = CacheWriter(tmp_path / "cache", smaller)
    writer.order = TokenOrder.by_id(VOCABULARY)
    for shard in range(smaller.shards):
        writer.write(shard, records_of(smaller, shard))
    with pytest.raises(UserError, match="beyond the vocabulary"):
        CacheReader(tmp_path / "cache", "train")[0]


def test_an_order_that_is_whole_is_not_written_again(folder: Path) -> None:
    before = (folder / TOKEN_ORDER).stat().st_mtime_ns
    save_order(folder, shuffled(VOCABULARY, seed=6))
    assert (folder / TOKEN_ORDER).stat().st_mtime_ns == before
    (folder / TOKEN_ORDER).write_bytes(b"x")
    save_order(folder, shuffled(VOCABULARY, seed=6))
    assert len(CacheReader(folder, "train")) == 20


def test_what_cannot_be_written_is_said(folder: Path) -> None:
    (folder / TOKEN_ORDER).unlink()
    (folder / TOKEN_ORDER / "x").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot write the cache here"):
        save_order(folder, shuffled(VOCABULARY, seed=6))
    with pytest.raises(UserError, match="token_order: has changed"):
        CacheReader(folder, "train")
