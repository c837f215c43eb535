"""A record comes back as it was; with any bit changed, or cut off anywhere, it does not come back at all."""

from __future__ import annotations

import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.cache.format.arrays import read_sizes, write_sizes
from distill.cache.format.records import DamagedRecord, Record, decode, encode
from distill.targets import schemes
from distill.targets.sparse import SparseTargets

MakeRecord = Callable[..., Record]
ALL: list[schemes.AnyScheme] = [
    schemes.make("varopt", threshold=0.05),
    schemes.make("top_k", entries=9),
    schemes.make("random", entries=12),
    schemes.make("hidden", size=6),
]
all_schemes = pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)


@given(
    scheme=st.sampled_from(ALL),
    seed=st.integers(0, 2**32),
    length=st.sampled_from([1, 2, 24, 131]),
    vocabulary=st.sampled_from([100, 2**18]),
    share=st.sampled_from([0.0, 0.03, 0.5, 1.0]),
)
@settings(max_examples=150, deadline=None)
def test_what_is_encoded_comes_back(
    make_record: MakeRecord,
    assert_same: Any,
    scheme: schemes.AnyScheme,
    seed: int,
    length: int,
    vocabulary: int,
    share: float,
) -> None:
    record = make_record(seed, scheme, length, vocabulary, share)
    data = encode(record, scheme)
    assert_same(decode(data, length, scheme), record)
    assert encode(record, scheme) == data


@all_schemes
def test_ids_at_both_ends_of_a_vocabulary_of_2_18(
    make_record: MakeRecord, assert_same: Any, scheme: schemes.AnyScheme
) -> None:
    record = make_record(1, scheme, 24, 2**18)
    record.input_ids_L[:4] = [0, 2**18 - 1, 0, 2**18 - 1]
    if not isinstance(scheme, schemes.Hidden):
        record.targets.ids_T[record.targets.ids_T == record.targets.ids_T.max()] = 2**18 - 1  # type: ignore[union-attr]
    assert_same(decode(encode(record, scheme), 24, scheme), record)


@all_schemes
def test_a_sample_without_loss(make_record: MakeRecord, assert_same: Any, scheme: schemes.AnyScheme) -> None:
    record = make_record(1, scheme, share=0.0)
    assert not record.loss_mask_L.any()
    assert_same(decode(encode(record, scheme), 24, scheme), record)


def test_a_long_sample(make_record: MakeRecord, assert_same: Any) -> None:
    """With 300,000 atoms, as 32,768 tokens have: more than pcodec puts on one page unless told to."""
    scheme = schemes.make("varopt", threshold=0.005)
    record = make_record(1, scheme, 6500, 4096, share=1.0)
    assert (record.targets.counts_N - record.targets.exact_N).sum() > 300_000  # type: ignore[union-attr]
    assert_same(decode(encode(record, scheme), 6500, scheme), record)


@all_schemes
def test_every_flipped_bit_is_noticed(make_record: MakeRecord, scheme: schemes.AnyScheme) -> None:
    data = encode(make_record(1, scheme, share=0.3), scheme)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedRecord):
            decode(bytes(damaged), 24, scheme)


@all_schemes
def test_every_truncation_and_extension_is_noticed(make_record: MakeRecord, scheme: schemes.AnyScheme) -> None:
    data = encode(make_record(1, scheme, share=0.3), scheme)
    for length in range(len(data)):
        with pytest.raises(DamagedRecord):
            decode(data[:length], 24, scheme)
    for tail in (b"\0", b"\xff" * 8, data):
        with pytest.raises(DamagedRecord):
            decode(data + tail, 24, scheme)


def test_another_length_or_scheme_is_noticed(make_record: MakeRecord) -> None:
    data = encode(make_record(1, ALL[0]), ALL[0])
    with pytest.raises(DamagedRecord):
        decode(data, 25, ALL[0])
    with pytest.raises(DamagedRecord):
        decode(data, 24, ALL[-1])


@all_schemes
def test_numbers_that_check_but_were_never_written_are_refused_in_little_memory(
    make_record: MakeRecord, scheme: schemes.AnyScheme
) -> None:
    """Every byte changed, and the checksum made right again: at worst another record, never a crash or gigabytes."""
    data = encode(make_record(1, scheme, share=0.3), scheme)
    refused = 0
    tracemalloc.start()
    for place in range(4, len(data)):
        for value in (0x00, 0x7F, 0x80, 0xFF):
            body = bytearray(data[4:])
            body[place - 4] = value
            crafted = zlib.crc32(body).to_bytes(4, "little") + bytes(body)
            try:
                decode(crafted, 24, scheme)
            except DamagedRecord:
                refused += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused > len(data) / 4
    assert peak < 2**22


def with_size(data: bytes, index: int, size: int) -> bytes:
    """A record whose header says `size` in one place, with a checksum that fits."""
    count = next(n for n in range(3, 40) if sum(read_sizes(data, 4, n)[0][2:]) == len(data) - read_sizes(data, 4, n)[1])
    sizes, start = read_sizes(data, 4, count)
    sizes[index] = size
    body = write_sizes(sizes) + data[start:]
    return zlib.crc32(body).to_bytes(4, "little") + body


@pytest.mark.parametrize("size", [0, 26, 2**20, 2**32 - 1, 2**55])
def test_sizes_in_a_header_are_not_taken_on_trust(make_record: MakeRecord, size: int) -> None:
    """A stranger's record that claims so many documents, runs, or bytes of a field."""
    data = encode(make_record(1, ALL[0]), ALL[0])
    sizes, _ = read_sizes(data, 4, 5)
    decode(with_size(data, 0, sizes[0]), 24, ALL[0])
    tracemalloc.start()
    for index in range(5):
        with pytest.raises(DamagedRecord):
            decode(with_size(data, index, size), 24, ALL[0])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_more_entries_than_a_scheme_makes_are_refused(make_record: MakeRecord) -> None:
    """Targets are padded to the widest position: one of 60,000 atoms would take that much for each of the others."""
    record = make_record(1, ALL[0], share=1.0)
    counts_N = torch.tensor([60_001] + [1] * 22)
    ids_T = torch.cat([torch.zeros(1), torch.arange(60_000), torch.zeros(22)]).long()
    wide = SparseTargets(ids_T, torch.ones(len(ids_T)), torch.ones(23, dtype=torch.int64), counts_N)
    data = encode(replace(record, targets=wide), ALL[0])
    with pytest.raises(DamagedRecord, match="entries"):
        decode(data, 24, ALL[0])
