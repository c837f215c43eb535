"""Caches at fsspec URLs: the same samples as in the folder, from local copies that are checked, shared and bounded."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from torch.utils.data import DataLoader

from distill.cache.format.folder import Manifest
from distill.cache.format.records import Record
from distill.cache.making.parts import merge
from distill.cache.making.writer import CacheWriter
from distill.cache.reading import storage
from distill.cache.reading.reader import CacheReader
from distill.cache.reading.storage import UrlStorage, is_url, open_storage
from distill.errors import UserError


def shard_file(shard: int, held_out: int = 2) -> str:
    """Return the name of a shard of a cache with so many shards of held-out samples."""
    split, number = ("held_out", shard) if shard < held_out else ("train", shard - held_out)
    return f"shards/{split}-{number:06d}.safetensors"


@pytest.fixture
def folder(tmp_path: Path, make_manifest: Callable[..., Manifest], records_of: Callable[..., list[Record]]) -> Path:
    """A cache of seven shards with a tokenizer."""
    writer = CacheWriter(tmp_path / "cache", make_manifest())
    for shard in writer.missing():
        writer.write(shard, records_of(writer.manifest, shard))
    (tmp_path / "cache" / "tokenizer").mkdir()
    (tmp_path / "cache" / "tokenizer" / "tokenizer.json").write_text("{}")
    return tmp_path / "cache"


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path, folder: Path) -> Iterator[str]:
    """The cache, uploaded."""
    where = f"memory://{uuid.uuid4()}/cache" if request.param == "memory" else f"file://{tmp_path}/bucket/cache"
    filesystem, root = fsspec.core.url_to_fs(where)
    filesystem.put(str(folder), root, recursive=True)
    yield where
    filesystem.rm(root, recursive=True)


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of local copies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "distill"


def shards_in(copies: Path) -> list[str]:
    return sorted(path.name[:6] for path in copies.rglob("shards/*"))


def same(one: Record, other: Record) -> bool:
    return np.array_equal(one.input_ids_L, other.input_ids_L) and all(
        np.array_equal(vars(one.targets)[name], vars(other.targets)[name]) for name in vars(one.targets)
    )


def test_paths_and_urls() -> None:
    assert is_url("s3://bucket/cache") and is_url("memory://x") and is_url("file:///x")
    assert not is_url("runs/demo/cache") and not is_url(Path("/runs")) and not is_url("c:\\runs")


def test_a_url_holds_what_its_folder_holds(url: str, folder: Path) -> None:
    for split in ("train", "held_out"):
        there, here = CacheReader(url, split), CacheReader(folder, split)
        assert len(there) == len(here)
        assert all(same(there[index], here[index]) for index in reversed(range(len(here))))
        assert (there.storage.folder / "tokenizer" / "tokenizer.json").read_text() == "{}"


def test_only_the_shards_in_use_are_copied_and_only_once(url: str, copies: Path) -> None:
    reader = CacheReader(url, "train")
    assert shards_in(copies) == []
    reader[0]
    assert shards_in(copies) == ["000002"]
    copy = next(copies.rglob("shards/000002*"))
    inode = copy.stat().st_ino
    CacheReader(url, "train")[1]  # in a later run too
    assert shards_in(copies) == ["000002"] and copy.stat().st_ino == inode


def test_a_folder_is_used_in_place(folder: Path, copies: Path) -> None:
    assert open_storage(folder).shard(3) == folder / shard_file(3)
    assert not copies.exists()


@pytest.mark.parametrize("damage", ["cut", "longer", "flipped", "missing"])
def test_a_copy_that_is_not_what_the_journal_says_is_not_used(url: str, copies: Path, damage: str) -> None:
    filesystem, root = fsspec.core.url_to_fs(url)
    path = f"{root}/{shard_file(3)}"
    content = filesystem.cat_file(path)
    changed = {"cut": content[:-1], "longer": content + b"\0", "flipped": content[:-1] + bytes([content[-1] ^ 1])}
    if damage == "missing":
        filesystem.rm(path)
    else:
        filesystem.pipe_file(path, changed[damage])
    reader = CacheReader(url, "train")
    reader[0]
    message = "train-000001.safetensors" + (": is missing" if damage == "missing" else " is not what its journal")
    with pytest.raises(UserError, match=message):
        reader[4]
    assert shards_in(copies) == ["000002"]
    filesystem.pipe_file(path, content)
    reader[4]


def test_copies_used_longest_ago_make_room(url: str, folder: Path, copies: Path) -> None:
    largest = max(path.stat().st_size for path in (folder / "shards").iterdir())
    reader = CacheReader(UrlStorage(url, local_copy_bytes=3 * largest), "train")
    for index in (0, 4, 8, 1):  # shards 2, 3, 4, and 2 again
        reader[index]
    assert shards_in(copies) == ["000002", "000003", "000004"]
    reader[12]  # shard 5
    assert shards_in(copies) == ["000002", "000004", "000005"]


def test_room_for_less_than_one_shard_still_reads(url: str, folder: Path, copies: Path) -> None:
    reader, here = CacheReader(UrlStorage(url, local_copy_bytes=1), "train"), CacheReader(folder, "train")
    assert all(same(reader[index], here[index]) for index in range(len(here)))
    assert len(shards_in(copies)) == 1


def test_a_cache_made_anew_at_the_same_url_is_not_mixed_up(
    url: str, tmp_path: Path, make_manifest: Callable[..., Manifest], records_of: Callable[..., list[Record]]
) -> None:
    before = CacheReader(url, "train")[0]
    writer = CacheWriter(tmp_path / "anew", make_manifest(seed=1))
    for shard in writer.missing():
        writer.write(shard, [*reversed(records_of(writer.manifest, shard))])
    filesystem, root = fsspec.core.url_to_fs(url)
    filesystem.rm(root, recursive=True)
    filesystem.put(str(tmp_path / "anew"), root, recursive=True)
    after = CacheReader(url, "train")
    assert after.manifest.seed == 1
    assert not same(after[0], before) and same(after[0], CacheReader(tmp_path / "anew", "train")[0])


def test_workers_share_the_copies(url: str, folder: Path, copies: Path) -> None:
    """Two processes that read all shards at once, with room for a few: each gets what it asked for."""
    local = UrlStorage(url, local_copy_bytes=3 * (folder / shard_file(0)).stat().st_size)
    reader, here = CacheReader(local, "train"), CacheReader(folder, "train")
    loader = DataLoader(reader, batch_size=1, num_workers=2, collate_fn=lambda records: records[0], shuffle=False)
    for _ in range(2):
        assert all(same(record, here[index]) for index, record in enumerate(loader))
    assert not list(copies.rglob("*.tmp"))


def test_an_unfinished_cache_is_refused(url: str) -> None:
    filesystem, root = fsspec.core.url_to_fs(url)
    journal = filesystem.cat_file(f"{root}/journal.jsonl")
    filesystem.pipe_file(f"{root}/journal.jsonl", b"".join(journal.splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=r"cache (memory|file)://.* is not finished \(1 of 7"):
        CacheReader(url, "train")


def test_what_cannot_be_read_is_said_in_one_line(tmp_path: Path) -> None:
    for url, message in {
        "memory://nowhere": r"memory://nowhere: no cache here \(manifest.json is missing\)",
        f"file://{tmp_path}": "no cache here",
        "gopher://x/cache": "gopher",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            CacheReader(url, "train")
        assert "\n" not in str(caught.value)


def test_file_names_do_not_lead_out_of_the_copy(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if url.startswith("file"):
        pytest.skip("no such names there")
    filesystem, _ = fsspec.core.url_to_fs(url)
    with monkeypatch.context() as patch:
        patch.setattr(type(filesystem), "find", lambda self, path, **_: [f"{path}/../../../escaped"])
        with pytest.raises(UserError, match="not a cache"):
            CacheReader(url, "train")
    assert not list(tmp_path.rglob("escaped"))


def test_copies_may_vanish_between_two_reads(url: str, copies: Path) -> None:
    reader = CacheReader(url, "train")
    first = reader[0]
    shutil.rmtree(copies)
    assert same(reader[0], first)


@pytest.mark.parametrize("make", [lambda path, secret: path.symlink_to(secret), lambda path, _: os.mkfifo(path)])
@pytest.mark.parametrize("name", ["manifest.json", "journal.jsonl", "tokenizer/x.json", shard_file(0)])
def test_links_out_of_a_url_and_pipes_are_not_copied(
    make: Any, name: str, tmp_path: Path, folder: Path, copies: Path
) -> None:
    shutil.copytree(folder, tmp_path / "bucket/one")
    path = tmp_path / "bucket/one" / name
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "secret").write_bytes(path.read_bytes() if path.exists() else b"mine")
    path.unlink(missing_ok=True)
    make(path, tmp_path / "secret")
    with pytest.raises(UserError, match="no plain file of this cache"):
        CacheReader(f"file://{tmp_path}/bucket/one", "held_out")[0]
    assert not [copy for copy in copies.rglob(path.name) if copy.is_file()]


def test_only_files_of_a_cache_are_copied(url: str, copies: Path) -> None:
    filesystem, root = fsspec.core.url_to_fs(url)
    for name in ("video.mp4", "notes/readme"):
        filesystem.makedirs(f"{root}/notes", exist_ok=True)
        filesystem.pipe_file(f"{root}/{name}", b"x" * 100)
    CacheReader(url, "train")[0]
    assert not [path for path in copies.rglob("*") if path.name in ("video.mp4", "readme")]


def test_a_file_without_end_is_not_copied(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_MOST_BESIDE", 10)
    with pytest.raises(UserError, match="larger than a file of a cache"):
        CacheReader(url, "train")


@pytest.mark.parametrize("keep", [0, 10])
def test_an_emptied_or_cut_copy_is_fetched_again(url: str, folder: Path, copies: Path, keep: int) -> None:
    """A full disk or a clean-up leaves such files."""
    CacheReader(url, "train")[0]
    for copy in [path for path in copies.rglob("*") if path.is_file() and path.name != "manifest.json"]:
        os.truncate(copy, min(keep, copy.stat().st_size))
    reader = CacheReader(url, "train")
    assert same(reader[0], CacheReader(folder, "train")[0])
    assert (reader.storage.folder / "tokenizer/tokenizer.json").read_text() == "{}"


def test_a_copy_with_flipped_bits_is_fetched_again(url: str, folder: Path, copies: Path, tmp_path: Path) -> None:
    """Its size is right. The records' checksums find it in a shard, a list of hashes in the files beside the shards."""
    CacheReader(url, "train")[0]
    for copy in [path for path in copies.rglob("*") if path.is_file()]:
        content = bytearray(copy.read_bytes())
        content[-1] ^= 1
        copy.write_bytes(content)
    reader = CacheReader(url, "train")
    assert same(reader[0], CacheReader(folder, "train")[0])
    assert (reader.storage.folder / "tokenizer/tokenizer.json").read_text() == "{}"


def test_a_merge_fetches_a_damaged_copy_again(url: str, folder: Path, copies: Path, tmp_path: Path) -> None:
    CacheReader(url, "train")[0]
    (copy,) = copies.rglob("shards/*")
    copy.write_bytes(bytes(copy.stat().st_size))
    merge([open_storage(url)], tmp_path / "whole", lambda _: None)
    assert {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*")} == {
        path.relative_to(folder) for path in folder.rglob("*")
    }
    CacheReader(tmp_path / "whole", "train")[0]


@pytest.mark.parametrize("name", ["home", "home/distill"])
def test_a_place_for_copies_that_cannot_be_used_names_its_variable(name: str, url: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("a file, where a folder should be")
    with pytest.raises(UserError, match="let XDG_CACHE_HOME name a folder elsewhere") as caught:
        CacheReader(url, "train")
    assert "\n" not in str(caught.value)
