"""A writer may end in any way and at any time: finished shards are kept, and the cache becomes the undisturbed one."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.cache.format.folder import Manifest, read_journal, read_manifest, seal
from distill.cache.format.records import encode
from distill.cache.format.shards import ShardFile
from distill.cache.format.tokenizer_files import save_tokenizer
from distill.cache.making.writer import CacheWriter
from distill.cache.reading.reader import CacheReader
from distill.errors import UserError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
STEPS = ("open", "write", "fsync", "replace", "unlink", "mkdir", "rmdir", "ftruncate")
CRASHED = 9


def crashes(action: Callable[[], None]) -> Iterator[int]:
    """Runs `action` in a process that ends at its first system call that changes a file, at the second, and so on."""
    for step in itertools.count():
        child = os.fork()
        if child == 0:
            try:
                end_at(step)
                action()
            except BaseException:
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            return
        assert status == CRASHED, f"step {step}: exit status {status}"
        yield step


def end_at(last: int) -> None:
    """End this process at a call; of a write, half is done."""
    steps = itertools.count()

    def ending(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if next(steps) == last:
                if name == "write":
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os._exit(CRASHED)
            return real(*arguments, **options)

        return call

    for name in STEPS:
        setattr(os, name, ending(name))


def check_reader(folder: Path, encoded: list[bytes], whole: bool) -> None:
    """A reader gets the message that the cache is not finished, or the data; finished shards are whole."""
    if whole:
        for split in ("held_out", "train"):
            reader = CacheReader(folder, split)
            for index, number in enumerate(reader.manifest.split_range(split)):
                key = reader.manifest.record_key(number)
                assert encode(reader[index], reader.scheme, key) == encoded[number]
    else:
        with pytest.raises(UserError, match=r"no cache here|is not finished"):
            CacheReader(folder, "train")
    manifest = read_manifest(folder) if (folder / "manifest.json").exists() else None
    for shard in read_journal(folder) if manifest else ():
        samples = manifest.shard_range(shard)
        with ShardFile(folder / manifest.shard_file(shard), len(samples)) as file:
            assert [file.record(row) for row in range(len(samples))] == encoded[samples.start : samples.stop]


def test_a_crash_at_any_step_heals_and_no_reader_sees_half_a_shard(
    tmp_path: Path, finish: Any, undisturbed: Any, manifest: Manifest, encoded: list[bytes], contents: Any
) -> None:
    folder, seen = tmp_path / "cache", 0
    for _ in crashes(lambda: finish(folder)):
        names = contents(folder) if folder.exists() else {}
        whole = names.get("journal.jsonl", b"").count(b"\n") == manifest.shards
        check_reader(folder, encoded, whole)
        finish(folder)
        assert contents(folder) == undisturbed
        check_reader(folder, encoded, whole=True)
        shutil.rmtree(folder)
        seen += 1
    assert seen > 30  # or the crashes were not where the writing is


def test_a_crash_at_every_step_in_turn_heals(tmp_path: Path, finish: Any, undisturbed: Any, contents: Any) -> None:
    """Each start goes on from what the one before left, and comes one call further."""
    folder = tmp_path / "cache"
    for step in crashes(lambda: finish(folder)):
        assert step < 200, "it does not come to an end"
    assert contents(folder) == undisturbed


def test_a_crash_while_a_cache_grows_heals_and_keeps_every_full_shard(
    tmp_path: Path, make_manifest: Any, make_record: Any, tokenizer: Any, contents: Any
) -> None:
    """Both splits grow, each with a last shard that is not full: any step may be the last one of a start."""

    def make(folder: Path, held_out: int, train: int) -> None:
        manifest = make_manifest(splits={"held_out": held_out, "train": train})
        writer = CacheWriter(folder, manifest, batch_size=2)
        save_tokenizer(folder, tokenizer)
        for shard in writer.missing():
            shift = 0 if "held_out" in manifest.shard_file(shard) else 100 - held_out
            made = [make_record(shift + sample, writer.scheme) for sample in manifest.shard_range(shard)]
            for start in range(writer.begun(shard), len(made), 2):
                writer.add(shard, made[start : start + 2], 2)

    small, grown, folder = tmp_path / "small", tmp_path / "grown", tmp_path / "cache"
    make(small, 5, 6)
    make(grown, 7, 9)
    full = {name: data for name, data in contents(small).items() if name.endswith("-000000.safetensors")}
    assert len(full) == 2 and full.items() <= contents(grown).items()
    for again in (True, False):
        shutil.copytree(small, folder)
        steps = 0
        for _ in crashes(lambda: make(folder, 7, 9)):
            found, steps = contents(folder), steps + 1
            assert full.items() <= found.items()
            with contextlib.suppress(UserError):  # the cache is not finished, as either of the two
                assert len(CacheReader(folder, "train")) in (6, 9)
            if again:  # each start goes on from the small cache, else from where the one before ended
                make(folder, 7, 9)
                assert contents(folder) == contents(grown)
                shutil.rmtree(folder)
                shutil.copytree(small, folder)
        assert steps > 20
        make(folder, 7, 9)
        assert contents(folder) == contents(grown)
        shutil.rmtree(folder)


def test_a_crash_while_another_cache_is_overwritten_heals(
    tmp_path: Path, finish: Any, undisturbed: Any, make_manifest: Any, records_of: Any, contents: Any
) -> None:
    old, other = tmp_path / "old", make_manifest(samples=13, seed=1)
    writer = CacheWriter(old, other)
    for shard in writer.missing():
        writer.write(shard, records_of(other, shard))
    folder = tmp_path / "cache"
    shutil.copytree(old, folder)
    for _ in crashes(lambda: finish(folder, overwrite=True)):
        finish(folder, overwrite=True)
        assert contents(folder) == undisturbed
        shutil.rmtree(folder)
        shutil.copytree(old, folder)


def test_overwriting_deletes_nothing_that_is_not_the_caches(
    tmp_path: Path, finish: Any, make_manifest: Any, contents: Any
) -> None:
    folder, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    CacheWriter(folder, make_manifest(seed=1))
    elsewhere.mkdir()
    for path in (folder / "notes.txt", folder / "draft.tmp", elsewhere / "000000.safetensors"):
        path.write_text("mine")
    (folder / "shards").symlink_to(elsewhere)
    with pytest.raises(UserError, match="is a link out of the cache"):
        CacheWriter(folder, make_manifest(seed=2), overwrite=True)
    (folder / "shards").unlink()
    CacheWriter(folder, make_manifest(seed=2), overwrite=True)
    assert contents(elsewhere) == {"000000.safetensors": b"mine"}
    assert (folder / "notes.txt").exists() and (folder / "draft.tmp").exists()


def test_everything_is_synced_before_something_relies_on_it(
    tmp_path: Path, manifest: Manifest, records_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that makes a power cut harmless; only a machine that loses power could show it from outside."""
    writer = CacheWriter(tmp_path / "cache", manifest)
    writer.write(0, records_of(manifest, 0))
    records, calls = records_of(manifest, 1), []

    def logged(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{arguments[0]}") if isinstance(arguments[0], int) else arguments[0]
            calls.append((name, Path(path).name))
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("write", "fsync", "replace"):
            patch.setattr(os, name, logged(name))
        writer.write(1, records)
    half = "held_out-000001.safetensors.tmp"
    shard = [("write", half), ("fsync", half), ("replace", half), ("fsync", "shards")]
    assert calls == [*shard, ("write", "journal.jsonl"), ("fsync", "journal.jsonl")]


def test_a_journal_line_that_is_cut_anywhere_is_made_again(
    tmp_path: Path, finish: Any, undisturbed: Any, contents: Any
) -> None:
    folder = tmp_path / "cache"
    finish(folder)
    journal = undisturbed["journal.jsonl"]
    last = journal[:-1].rfind(b"\n") + 1
    for end in [*range(last, len(journal), 40), len(journal) - 1]:
        (folder / "journal.jsonl").write_bytes(journal[:end])
        with pytest.raises(UserError, match="1 of 4 shards to go"):
            CacheReader(folder, "train")
        finish(folder)
        assert contents(folder) == undisturbed


def test_the_order_of_the_work_leaves_no_trace(
    tmp_path: Path, manifest: Manifest, records_of: Any, undisturbed: Any, contents: Any, tokenizer: Any
) -> None:
    folder = tmp_path / "cache"
    writer = CacheWriter(folder, manifest, batch_size=2)
    save_tokenizer(folder, tokenizer)
    for shard in (2, 0, 3, 1):
        writer.write(shard, records_of(manifest, shard))
    assert contents(folder) == undisturbed
    lines = undisturbed["journal.jsonl"].splitlines(keepends=True)
    (folder / "journal.jsonl").write_bytes(b"".join(reversed(lines)))
    seal(folder)
    assert contents(folder) == undisturbed


def test_kills_at_random_instants_change_nothing() -> None:
    """The real command, from start to end; tests/benchmarks/kill_storm.py throws as many kills as one likes."""
    storm = [sys.executable, str(BENCHMARKS / "kill_storm.py"), "--kills", "12"]
    done = subprocess.run(storm, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12  kills" in done.stdout
