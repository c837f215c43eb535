"""Reading: any order and any number of workers give the same samples, and nothing damaged is passed on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from distill.cache.format.folder import MANIFEST, Manifest
from distill.cache.format.records import Record
from distill.cache.making.writer import CacheWriter
from distill.cache.reading.reader import CacheReader
from distill.errors import UserError


def shard_file(shard: int, held_out: int = 2) -> str:
    """Return the name of a shard of a cache with so many shards of held-out samples."""
    split, number = ("held_out", shard) if shard < held_out else ("train", shard - held_out)
    return f"shards/{split}-{number:06d}.safetensors"


RecordsOf = Callable[[Manifest, int], list[Record]]


@pytest.fixture(scope="session")
def cache(
    tmp_path_factory: pytest.TempPathFactory, make_manifest: Callable[..., Manifest], records_of: RecordsOf
) -> Path:
    folder, manifest = tmp_path_factory.mktemp("reader") / "cache", make_manifest()
    writer = CacheWriter(folder, manifest)
    for shard in writer.missing():
        writer.write(shard, records_of(manifest, shard))
    return folder


@pytest.fixture(scope="session")
def written(make_manifest: Callable[..., Manifest], records_of: RecordsOf) -> list[Record]:
    """The 25 samples; the first five are held out."""
    return [record for shard in range(7) for record in records_of(make_manifest(), shard)]


def check_same(found: Any, expected: Any) -> None:
    for field in fields(expected):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if is_dataclass(theirs):
            check_same(ours, theirs)
        elif isinstance(theirs, Tensor):
            assert torch.equal(ours, theirs), field.name
        else:
            assert np.array_equal(ours, theirs), field.name


def test_each_split_has_its_samples(cache: Path, written: list[Record]) -> None:
    train, held_out = CacheReader(cache, "train"), CacheReader(cache, "held_out")
    assert (len(held_out), len(train)) == (5, 20)
    for found, expected in zip([*held_out, *train], written, strict=True):  # type: ignore[misc]
        check_same(found, expected)
    with pytest.raises(IndexError):
        train[20]
    with pytest.raises(IndexError):
        train[-1]


def test_any_order(cache: Path, written: list[Record]) -> None:
    train = CacheReader(cache, "train")
    for index in np.random.default_rng(0).integers(20, size=60).tolist():
        check_same(train[index], written[5 + index])


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_rows_of_a_batch_are_its_positions_with_loss(cache: Path, written: list[Record], batch_size: int) -> None:
    """Row n of the targets is of the n-th True of the mask, sample after sample, whatever the batch."""
    train = CacheReader(cache, "train")
    alone = [train.collate([record]) for record in written[5:]]
    for start in range(0, 20, batch_size):
        rows = range(start, min(start + batch_size, 20))
        batch = train.collate([train[index] for index in rows])
        assert int(batch.loss_mask_BL.sum()) == len(batch.entropy_N) == len(batch.targets.dense(1009))  # type: ignore[union-attr]
        assert torch.equal(batch.input_ids_BL, torch.cat([alone[index].input_ids_BL for index in rows]))
        assert torch.equal(batch.loss_mask_BL, torch.cat([alone[index].loss_mask_BL for index in rows]))
        for name in ("entropy_N", "surprisal_N"):
            assert torch.equal(getattr(batch, name), torch.cat([getattr(alone[index], name) for index in rows]))
        dense = [alone[index].targets.dense(1009) for index in rows]  # type: ignore[union-attr]
        assert torch.equal(batch.targets.dense(1009), torch.cat(dense))  # type: ignore[union-attr]


def test_a_row_holds_its_positions_numbers(cache: Path, written: list[Record]) -> None:
    train = CacheReader(cache, "train")
    batch = train.collate(written[5:10])
    position = 0
    for row, record in enumerate(written[5:10]):
        stored: Any = record.targets
        counts_N = stored.counts_N.numpy()
        ends_N = np.cumsum(counts_N)
        assert torch.equal(batch.input_ids_BL[row], torch.from_numpy(record.input_ids_L.astype(np.int64)))
        assert torch.equal(batch.position_ids_BL[row], torch.from_numpy(record.position_ids_L.astype(np.int64)))
        for place in range(int(record.loss_mask_L.sum())):
            ids = stored.ids_T[ends_N[place] - counts_N[place] : ends_N[place]]
            targets: Any = batch.targets
            assert targets[position : position + 1].ids_T.tolist() == ids.tolist()
            assert targets.exact_N[position] == stored.exact_N[place]
            assert targets.counts_N[position] == counts_N[place]
            assert batch.entropy_N[position] == record.entropy_N[place] / 64
            assert batch.surprisal_N[position] == record.surprisal_N[place] / 64
            position += 1
    assert position == len(batch.entropy_N) > 10


def test_a_batch_without_loss(cache: Path, written: list[Record]) -> None:
    nothing = [record for record in written if not record.loss_mask_L.any()]
    batch: Any = CacheReader(cache, "train").collate(nothing[:2])
    assert len(batch.targets.counts_N) == len(batch.targets.ids_T) == len(batch.entropy_N) == 0
    assert batch.input_ids_BL.shape == (2, 24)


def test_workers_read_the_same(cache: Path) -> None:
    train = CacheReader(cache, "train")
    train[7]  # what is open here must not disturb the workers
    one, two = (
        list(DataLoader(train, batch_size=3, collate_fn=train.collate, num_workers=workers)) for workers in (0, 2)
    )
    assert len(one) == len(two) == 7
    for expected, found in zip(one, two, strict=True):
        check_same(found, expected)


def test_moving_a_batch_moves_all_of_it(cache: Path, written: list[Record]) -> None:
    batch = CacheReader(cache, "train").collate(written[:2])
    moved: Any = batch.to(torch.device("meta"))
    assert {moved.input_ids_BL.device.type, moved.targets.weights_T.device.type, moved.entropy_N.device.type} == {
        "meta"
    }


def test_an_unfinished_cache_is_refused(
    tmp_path: Path, make_manifest: Callable[..., Manifest], records_of: RecordsOf
) -> None:
    manifest = make_manifest()
    writer = CacheWriter(tmp_path, manifest)
    for shard in (0, 1, 2, 3, 4, 6):
        with pytest.raises(UserError, match=r"not finished \(\d of 7 shards to go\): run `distill cache-teacher`"):
            CacheReader(tmp_path, "train")
        writer.write(shard, records_of(manifest, shard))
    with pytest.raises(UserError, match=r"not finished \(1 of 7"):
        CacheReader(tmp_path, "held_out")
    writer.write(5, records_of(manifest, 5))
    assert len(CacheReader(tmp_path, "train")) == 20


def test_a_folder_without_a_cache(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"no cache here.*run `distill cache-teacher`"):
            CacheReader(folder, "train")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 3}, "format version 3, this program reads versions 1 and 2"),
        ({"version": None}, "format version None"),
        ({"format": "webpack"}, "not the manifest of a cache"),
        ({"seed": "zero"}, "manifest.json"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(
    tmp_path: Path, cache: Path, make_manifest: Callable[..., Manifest], change: dict[str, Any], says: str
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    (folder / MANIFEST).write_text(json.dumps({**json.loads((cache / MANIFEST).read_text()), **change}))
    for start in (lambda: CacheReader(folder, "train"), lambda: CacheWriter(folder, make_manifest())):
        with pytest.raises(UserError, match=says):
            start()


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"nul", b"9" * 5000])
def test_a_manifest_that_is_no_json_is_refused(tmp_path: Path, cache: Path, text: bytes) -> None:
    shutil.copytree(cache, tmp_path / "cache")
    (tmp_path / "cache" / MANIFEST).write_bytes(text)
    with pytest.raises(UserError, match=r"manifest\.json"):
        CacheReader(tmp_path / "cache", "train")


def check_damage(folder: Path, written: list[Record], rows: range) -> int:
    """Each sample of the shard is what was written or refused with a UserError; returns how many were refused."""
    refused = 0
    train = CacheReader(folder, "train")
    for row in rows:
        try:
            check_same(train[row], written[5 + row])
        except UserError as error:
            assert shard_file(3) in str(error) and "--verify" in str(error)
            refused += 1
    return refused


def test_a_damaged_shard_is_refused_or_harmless(tmp_path: Path, cache: Path, written: list[Record]) -> None:
    """A bit changed anywhere in the file, its header too."""
    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    path, rows = folder / shard_file(3), range(4, 8)  # training samples 4 to 7
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        assert check_damage(folder, written, rows) >= 1
    path.write_bytes(whole)
    assert check_damage(folder, written, rows) == 0


def test_a_truncated_or_missing_shard_is_refused(tmp_path: Path, cache: Path, written: list[Record]) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    path = folder / shard_file(3)
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert check_damage(folder, written, range(4, 8)) >= 1
    path.unlink()
    assert check_damage(folder, written, range(4, 8)) == 4
    assert check_damage(folder, written, range(0, 4)) == 0


def test_records_in_each_others_place_are_refused(tmp_path: Path, cache: Path) -> None:
    """Two whole shards, exchanged: every checksum fits its record, and yet it is another sample's."""
    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    (folder / shard_file(2)).rename(folder / "aside")
    (folder / shard_file(3)).rename(folder / shard_file(2))
    (folder / "aside").rename(folder / shard_file(3))
    with pytest.raises(UserError, match=r"cannot be read"):
        CacheReader(folder, "train")[7]
