"""Every difference is found and named with what mends it; what is dropped is made again, and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.cache.format.folder import Manifest, read_journal
from distill.cache.format.head import HEAD, load_head, save_head
from distill.cache.format.tokenizer_files import checked_tokenizer, save_tokenizer
from distill.cache.making.parts import merge
from distill.cache.making.repair import repair
from distill.cache.making.writer import CacheWriter
from distill.cache.reading.reader import CacheReader
from distill.cache.reading.storage import FolderStorage
from distill.cache.reading.verify import verify
from distill.errors import UserError
from distill.models.language_model import Head


def shard_file(shard: int, held_out: int = 2) -> str:
    """Return the name of a shard of a cache with so many shards of held-out samples."""
    split, number = ("held_out", shard) if shard < held_out else ("train", shard - held_out)
    return f"shards/{split}-{number:06d}.safetensors"


def join(folder: Path) -> None:
    merge([FolderStorage(folder)], folder.with_name("to"), lambda _: None)


def open_reader(folder: Path) -> CacheReader:
    return CacheReader(folder, "held_out")


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def finish(make_manifest: Any, records_of: Any, tokenizer: Any) -> Callable[..., Manifest]:
    """`finish(folder)`: make a cache of four shards, or what is missing of it; `made` lists the shards that it made."""

    def run(folder: Path, made: list[int] | None = None, **changes: Any) -> Manifest:
        manifest: Manifest = make_manifest(samples=14, **changes)
        writer = CacheWriter(folder, manifest)
        save_tokenizer(folder, tokenizer)
        for shard in writer.missing():
            writer.write(shard, records_of(manifest, shard))
            if made is not None:
                made.append(shard)
        return manifest

    return run


@pytest.fixture
def cache(tmp_path: Path, finish: Any) -> Path:
    finish(tmp_path / "cache")
    return tmp_path / "cache"


def found(folder: Path) -> dict[str, str]:
    return {problem.file: problem.problem for problem in verify(folder).problems}


def flip(path: Path, place: int = -1, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_a_whole_cache_has_no_problems_and_nothing_to_repair(cache: Path, contents: Any) -> None:
    before = contents(cache)
    report = verify(cache)
    assert (report.problems, report.whole, report.bad, report.to_do) == ([], 5, 0, 0)
    assert repair(cache) == [] and contents(cache) == before


def test_each_finding_names_file_and_remedy(cache: Path) -> None:
    flip(cache / shard_file(1))
    (cache / shard_file(3)).unlink()
    (cache / "shards/readme.txt").write_text("hello")
    (cache / "notes").mkdir()
    (cache / "shards/000002.safetensors.tmp").write_bytes(b"")
    flip(cache / "tokenizer/tokenizer.json")
    assert found(cache) == {
        shard_file(1): "has changed",
        shard_file(3): "is missing",
        "shards/readme.txt": "is not part of the cache",
        "notes": "is not part of the cache",
        "shards/000002.safetensors.tmp": "was left half written",
        "tokenizer/tokenizer.json": "has changed",
    }
    remedies = {problem.file: problem.remedy for problem in verify(cache).problems}
    assert "--repair" in remedies[shard_file(1)] and "move" in remedies["notes"]


def test_an_unfinished_cache_is_not_whole(tmp_path: Path, make_manifest: Any, records_of: Any, tokenizer: Any) -> None:
    manifest = make_manifest(samples=14)
    writer = CacheWriter(tmp_path, manifest)
    save_tokenizer(tmp_path, tokenizer)
    writer.write(0, records_of(manifest, 0))
    report = verify(tmp_path)
    assert (report.whole, report.bad, report.to_do) == (1, 0, 4)
    assert found(tmp_path) == {"journal.jsonl": "not finished, 4 shards to go"}


@pytest.mark.parametrize("how", ["changed", "cut", "missing", "line", "lines", "no journal"])
def test_repair_drops_what_is_bad_and_the_next_run_makes_just_that(
    how: str, cache: Path, finish: Any, tmp_path: Path, contents: Any
) -> None:
    undisturbed, journal = contents(cache), cache / "journal.jsonl"
    if how == "changed":
        flip(cache / shard_file(2), 40)
    elif how == "cut":
        (cache / shard_file(2)).write_bytes(undisturbed[shard_file(2)][:-3])
    elif how == "missing":
        (cache / shard_file(2)).unlink()
    elif how == "line":
        flip(journal, 30)
    elif how == "lines":
        journal.write_bytes(b"nonsense\n" + journal.read_bytes() * 2)
    else:
        journal.unlink()
    said, made = repair(cache), []
    finish(cache, made)
    assert contents(cache) == undisturbed
    # Whole shards whose line is lost are taken back: a teacher's day may have gone into them.
    assert made == ([2] if how in ("changed", "cut", "missing") else [])
    assert said and (how == "lines" or any("00000" in line for line in said))


def test_repair_takes_back_only_what_is_whole_and_in_its_place(cache: Path, finish: Any, contents: Any) -> None:
    undisturbed = contents(cache)
    (cache / "journal.jsonl").unlink()
    flip(cache / shard_file(0), 300)
    (cache / shard_file(1)).write_bytes(undisturbed[shard_file(2)])
    flip(cache / shard_file(2), 100)
    made: list[int] = []
    repair(cache)
    finish(cache, made)
    assert made == [0, 1, 2] and contents(cache) == undisturbed


def test_repair_mends_the_tokenizer_through_the_next_run(cache: Path, finish: Any, contents: Any) -> None:
    undisturbed = contents(cache)
    flip(cache / "tokenizer/SHA256SUMS")
    assert repair(cache)
    finish(cache)
    assert contents(cache) == undisturbed


def test_repair_leaves_files_alone_that_are_not_the_caches(cache: Path) -> None:
    (cache / "shards/notes.tmp").write_text("mine")
    (cache / "shards/000099.safetensors").write_text("mine")
    repair(cache)
    assert sorted(found(cache)) == ["shards/000099.safetensors", "shards/notes.tmp"]


def test_repair_does_not_touch_a_cache_whose_manifest_is_damaged(cache: Path, contents: Any) -> None:
    flip(cache / "manifest.json", 50)
    before = contents(cache)
    with pytest.raises(UserError, match=r"manifest.json.*restore it, or make the cache anew"):
        repair(cache)
    assert contents(cache) == before


def test_an_exchanged_manifest_is_found_and_costs_no_shard(
    cache: Path, finish: Any, tmp_path: Path, contents: Any
) -> None:
    """A seed, say, that is not the one the shards were made with: each file is whole, and yet nothing fits."""
    finish(tmp_path / "other", seed=1)
    shutil.copy(tmp_path / "other/manifest.json", cache / "manifest.json")
    before = contents(cache)
    assert "another cache" in str(found(cache))
    with pytest.raises(UserError, match="another cache"):
        CacheReader(cache, "train")
    with pytest.raises(UserError, match="exchanged"):
        repair(cache)
    assert contents(cache) == before


def test_shards_of_another_cache_or_in_another_place_are_not_read(cache: Path, finish: Any, tmp_path: Path) -> None:
    """Not even where the reader does not compare a shard's hash: each record knows whose it is."""
    finish(tmp_path / "other", seed=1)
    for source in (tmp_path / "other" / shard_file(3), cache / shard_file(2)):
        shutil.copy(source, cache / shard_file(3))
        assert found(cache) == {shard_file(3): "has changed"}
        reader = CacheReader(cache, "train")
        assert len(reader[0].input_ids_L)
        with pytest.raises(UserError, match="checksum"):
            reader[4]


def test_exchanged_offsets_are_not_read(cache: Path) -> None:
    """Two records in each other's place: both are whole."""
    path = cache / shard_file(0)
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for size in (8, 16):
        swapped = content[:]
        swapped[start : start + size] = content[start + 8 : start + 8 + size]
        path.write_bytes(swapped)
        reader = CacheReader(cache, "held_out")
        with pytest.raises(UserError, match=r"000000.safetensors, sample 0 cannot be read"):
            reader[0]


def line_of(content: dict[str, Any]) -> bytes:
    """A journal line with the right checksum, whatever it says."""
    content = {key: value for key, value in content.items() if key != "crc32"}
    crc32 = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    return json.dumps({**content, "crc32": f"{crc32:08x}"}, sort_keys=True).encode() + b"\n"


@pytest.mark.parametrize(
    "changes",
    [
        {"file": "../../etc/passwd"},
        {"file": "shards/000001.safetensors"},
        {"file": "/dev/zero"},
        {"shard": 4, "file": "shards/000004.safetensors"},
        {"shard": 10**15, "file": "shards/1000000000000000.safetensors"},
        {"shard": -1},
        {"shard": True},
        {"bytes": 1.5},
        {"bytes": 2**70},
        {"samples": 3},
        {"sha256": "x" * 64},
        {"more": 1},
    ],
)
def test_a_line_that_sends_one_elsewhere_is_refused(changes: dict[str, Any], cache: Path) -> None:
    journal = cache / "journal.jsonl"
    first, *others = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(line_of({**json.loads(first), **changes}) + b"".join(others))
    with pytest.raises(UserError, match=r"journal.jsonl, line 1: .*--repair"):
        read_journal(cache)
    assert "journal.jsonl, line 1" in found(cache)
    repair(cache)
    assert found(cache) == {}


def test_a_line_with_the_right_checksum_is_the_writers_own(cache: Path) -> None:
    lines = (cache / "journal.jsonl").read_bytes().splitlines(keepends=True)
    assert [line_of(json.loads(line)) for line in lines] == lines


def test_what_is_no_plain_file_is_refused_and_does_not_hang(cache: Path) -> None:
    """A pipe would never answer; /dev/zero would never end."""

    for name in ("manifest.json", "journal.jsonl", shard_file(0), "tokenizer/tokenizer.json"):
        content = (cache / name).read_bytes()
        for put in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)):
            (cache / name).unlink()
            put(cache / name)
            with contextlib.suppress(UserError):
                assert verify(cache).problems
            touch = checked_tokenizer if "tokenizer" in name else lambda folder: CacheReader(folder, "held_out")[0]
            with pytest.raises(UserError):
                touch(cache)
            (cache / name).rmdir() if (cache / name).is_dir() else (cache / name).unlink()
            (cache / name).write_bytes(content)
    assert verify(cache).problems == []


def test_a_download_from_a_hub_is_good(cache: Path, tmp_path: Path) -> None:
    """It is a folder of links to blobs."""
    snapshot, blobs = tmp_path / "datasets--a--b/snapshots/1234", tmp_path / "datasets--a--b/blobs"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir()
    shutil.move(cache, snapshot)
    for number, path in enumerate(path for path in sorted(snapshot.rglob("*")) if path.is_file()):
        shutil.move(path, blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    assert verify(snapshot).problems == []
    assert len(CacheReader(snapshot, "held_out")[0].input_ids_L)


@pytest.mark.parametrize("name", ["shards", "tokenizer", "manifest.json", "journal.jsonl", "tokenizer/tokenizer.json"])
def test_a_link_out_of_the_cache_is_not_followed(name: str, cache: Path, tmp_path: Path, contents: Any) -> None:
    """Repair would delete what it leads to, and a merge would copy it."""
    shutil.move(cache / name, tmp_path / "elsewhere")
    (cache / name).symlink_to(tmp_path / "elsewhere")
    for path in cache.rglob("*.safetensors"):
        flip(path)
    before = contents(tmp_path / "elsewhere") if (tmp_path / "elsewhere").is_dir() else None
    for way in (
        verify,
        repair,
        open_reader,
        lambda folder: merge([FolderStorage(folder)], tmp_path / "to", lambda _: None),
    ):
        with pytest.raises(UserError, match="is a link out of the cache"):
            way(cache)
    assert before is None or contents(tmp_path / "elsewhere") == before


def test_a_shard_that_is_a_link_out_is_dropped_and_not_what_it_names(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes((cache / shard_file(0)).read_bytes())
    (cache / shard_file(0)).unlink()
    (cache / shard_file(0)).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="is a link out of the cache"):
        CacheReader(cache, "held_out")[0]
    with pytest.raises(UserError, match="is a link out of the cache"):
        join(cache)
    assert [found.problem for found in verify(cache).problems] == ["is a link out of the cache"]
    assert len(repair(cache)) == 1 and (tmp_path / "mine").exists() and not (cache / shard_file(0)).is_symlink()


def test_files_beside_the_shards_are_copied_but_not_what_links_name(cache: Path, tmp_path: Path) -> None:
    (cache / "notes").mkdir()
    (tmp_path / "secret").write_text("mine")
    (cache / "notes/readme").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="notes/readme: is a link out of the cache"):
        join(cache)
    assert not any(path.name == "readme" for path in (tmp_path / "to").rglob("*"))


# The head of a cache of hidden states.


def test_the_head_is_the_same_bytes_each_time_and_no_bit_of_it_can_change(tmp_path: Path) -> None:
    head = Head(torch.arange(15.0).reshape(5, 3).bfloat16(), torch.ones(5), scale=0.5)
    for name in "abcdefgh":
        (tmp_path / name).mkdir()
        save_head(tmp_path / name, head)
    written = {(tmp_path / name / HEAD).read_bytes() for name in "abcdefgh"}
    assert len(written) == 1
    content = written.pop()
    for bit in range(0, 8 * len(content), 3):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        (tmp_path / HEAD).write_bytes(changed)
        with pytest.raises(UserError, match=HEAD):
            load_head(tmp_path)
    (tmp_path / HEAD).write_bytes(content)
    assert load_head(tmp_path).scale == 0.5


# The command.


def test_the_command_verifies_and_repairs(cache: Path, distill: Any) -> None:
    assert "5 shards whole, 0 not" in distill("inspect", cache, "--verify").done().out
    assert "nothing to repair" in distill("inspect", cache, "--repair").done().out
    flip(cache / shard_file(2))
    outcome = distill("inspect", cache, "--verify")
    assert outcome.status == 1 and outcome.err == ""
    assert f"{shard_file(2)} has changed: run `distill inspect {cache} --repair`" in outcome.out
    repaired = distill("inspect", cache, "--repair", "--verify")
    assert repaired.status == 1  # not finished
    assert f"{shard_file(2)} has changed: dropped" in repaired.out and "1 not made yet" in repaired.out
    flip(cache / "manifest.json", 9)
    assert distill("inspect", cache, "--verify").status == 1
    distill("inspect", cache, "--repair").refused("manifest.json")


def test_a_storm_of_flips_and_cuts_is_found_and_not_read() -> None:
    """tests/benchmarks/corruption_storm.py does 10,000 flips and 1,000 cuts; here some hundreds, other ones each."""
    script = str(BENCHMARKS / "corruption_storm.py")
    storm = [sys.executable, script, "--flips", "250", "--truncations", "50", "--seed", "7"]
    done = subprocess.run(storm, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 problems" in done.stdout
