"""Reading at any size: nothing kept open or in memory between two samples, by any number of threads and processes."""

from __future__ import annotations

import copy
import os
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from distill.cache.format.folder import Manifest, seal
from distill.cache.format.records import Record
from distill.cache.making.writer import CacheWriter
from distill.cache.reading.reader import CacheReader
from distill.errors import UserError

RecordsOf = Callable[[Manifest, int], list[Record]]


def write(folder: Path, manifest: Manifest, records_of: RecordsOf, shards: Any = None) -> Path:
    writer = CacheWriter(folder, manifest)
    for shard in shards or range(manifest.shards):
        writer.write(shard, records_of(manifest, shard))
    return folder


@pytest.fixture(scope="module")
def cache(
    tmp_path_factory: pytest.TempPathFactory, make_manifest: Callable[..., Manifest], records_of: RecordsOf
) -> Path:
    """120 samples in 60 shards."""
    manifest = make_manifest(samples=120, shard_samples=2)
    return write(tmp_path_factory.mktemp("reading") / "cache", manifest, records_of)


def same(one: Record, other: Record) -> bool:
    return np.array_equal(one.input_ids_L, other.input_ids_L) and np.array_equal(one.entropy_N, other.entropy_N)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux tells")
def test_nothing_stays_open_or_mapped(cache: Path) -> None:
    reader = CacheReader(cache, "train")
    reader[0]

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count(".safetensors")

    before = held()
    records = [reader[index] for index in range(len(reader))]
    assert held() == before
    assert len(records) == 115


def test_what_a_reader_keeps_does_not_grow_with_the_cache(
    tmp_path: Path, make_manifest: Callable[..., Manifest], records_of: RecordsOf
) -> None:
    """All that it holds, as sent to a worker, before and after reading: no table of samples or shards."""
    kept = []
    for name, samples in (("small", 10), ("large", 900)):
        folder = write(tmp_path / name, make_manifest(samples=samples, shard_samples=3), records_of)
        reader = CacheReader(folder, "train")
        kept.append(len(pickle.dumps(reader)))
        for index in range(len(reader)):
            reader[index]
        kept.append(len(pickle.dumps(reader)))
    before, after = np.subtract(kept[2:], kept[:2])
    assert abs(before) < 16 and abs(after) < 16


def test_threads_read_at_once(cache: Path) -> None:
    reader = CacheReader(cache, "train")
    alone = [reader[index] for index in range(len(reader))]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(reader.__getitem__, [*range(len(reader))] * 3))
    assert all(same(record, alone[index % len(alone)]) for index, record in enumerate(together))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_either_kind_read_the_same(cache: Path, context: str) -> None:
    if context == "fork" and sys.platform != "linux":
        pytest.skip("no fork there")
    reader = CacheReader(cache, "held_out")
    reader[0]  # open before the workers are
    loader = DataLoader(reader, num_workers=2, multiprocessing_context=context, collate_fn=first)
    assert all(same(record, reader[index]) for index, record in enumerate(loader))


def first(records: list[Record]) -> Record:
    return records[0]


def test_a_reader_can_be_copied_and_sent(cache: Path) -> None:
    reader = CacheReader(cache, "train")
    for other in (copy.deepcopy(reader), pickle.loads(pickle.dumps(reader))):
        assert same(other[7], reader[7])


def test_a_cache_is_the_same_by_path_and_by_text(cache: Path) -> None:
    assert same(CacheReader(str(cache), "train")[3], CacheReader(cache, "train")[3])


def test_a_reader_during_writing_is_told_so(
    tmp_path: Path, make_manifest: Callable[..., Manifest], records_of: RecordsOf
) -> None:
    manifest = make_manifest()
    folder = write(tmp_path / "cache", manifest, records_of, shards=[3, 1])
    with pytest.raises(UserError, match=r"not finished \(5 of 7 shards to go\): run `distill cache-teacher` again"):
        CacheReader(folder, "train")


def test_shards_written_in_any_order_read_the_same(
    tmp_path: Path, make_manifest: Callable[..., Manifest], records_of: RecordsOf
) -> None:
    manifest = make_manifest()
    straight = CacheReader(write(tmp_path / "straight", manifest, records_of), "train")
    folder = write(tmp_path / "jumping", manifest, records_of, shards=[6, 2, 0, 1, 5, 3, 4])
    jumping = CacheReader(folder, "train")
    assert all(same(straight[index], jumping[index]) for index in range(len(straight)))
    seal(folder)
    assert (folder / "journal.jsonl").read_bytes() == (tmp_path / "straight" / "journal.jsonl").read_bytes()


@pytest.mark.parametrize("index", [-1, 115, 10**12])
def test_there_are_no_other_samples(cache: Path, index: int) -> None:
    with pytest.raises(IndexError):
        CacheReader(cache, "train")[index]
