"""Whatever ends a writer, and whenever: what was finished is kept, and the cache becomes the undisturbed one."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill import files
from distill.cache.format import Manifest, read_journal, read_manifest, seal, shard_file
from distill.cache.locking import sole_writer
from distill.cache.reader import CacheReader
from distill.cache.records import Record, pack
from distill.cache.shards import ShardFile
from distill.cache.tokenizer_files import checked_tokenizer, save_tokenizer, tokenizer_problems
from distill.cache.writer import CacheWriter
from distill.errors import UserError

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
STEPS = ("open", "write", "fsync", "replace", "unlink", "mkdir", "rmdir", "ftruncate")
CRASHED = 9


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Tokenizer:
    """Writes two files, as a tokenizer does."""

    def save_pretrained(self, folder: Path, /) -> None:
        folder.mkdir()
        (folder / "tokenizer.json").write_text('{"model": "BPE"}')
        (folder / "tokenizer_config.json").write_text('{\n  "is_local": true,\n  "model_max_length": 12\n}\n')


@pytest.fixture
def manifest(make_manifest: Any) -> Manifest:
    return make_manifest(samples=10, shard_samples=4)


@pytest.fixture
def records_of(manifest: Manifest, records_of: Any) -> Callable[[Manifest, int], list[Record]]:
    """As the other, but this manifest's records are made once."""
    made = [records_of(manifest, shard) for shard in range(manifest.shards)]
    return lambda wanted, shard: made[shard] if wanted is manifest else records_of(wanted, shard)


@pytest.fixture
def packed(manifest: Manifest, records_of: Any) -> list[bytes]:
    """The records of all samples as bytes."""
    records = [record for shard in range(manifest.shards) for record in records_of(manifest, shard)]
    scheme = manifest.make_scheme()
    return [pack(record, scheme, manifest.record_key(sample)) for sample, record in enumerate(records)]


@pytest.fixture
def finish(manifest: Manifest, records_of: Any) -> Callable[..., None]:
    """`finish(folder)`: make a cache, or what is missing of it."""

    def run(folder: Path, overwrite: bool = False) -> None:
        writer = CacheWriter(folder, manifest, overwrite)
        save_tokenizer(folder, Tokenizer())
        for shard in writer.missing():
            writer.write(shard, records_of(manifest, shard))

    return run


@pytest.fixture
def undisturbed(tmp_path: Path, finish: Any) -> dict[str, bytes]:
    finish(tmp_path / "undisturbed")
    return contents(tmp_path / "undisturbed")


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


def check_reader(folder: Path, packed: list[bytes], whole: bool) -> None:
    """Who reads now gets the message that the cache is not finished, or the data; finished shards are whole."""
    if whole:
        for split in ("held_out", "train"):
            reader = CacheReader(folder, split)
            for index in range(len(reader)):
                key = reader.manifest.record_key(reader.start + index)
                assert pack(reader[index], reader.scheme, key) == packed[reader.start + index]
    else:
        with pytest.raises(UserError, match=r"no cache here|is not finished"):
            CacheReader(folder, "train")
    for shard in read_journal(folder) if (folder / "manifest.json").exists() else ():
        samples = read_manifest(folder).shard_range(shard)
        with ShardFile(folder / shard_file(shard), len(samples)) as file:
            assert [file.record(row) for row in range(len(samples))] == packed[samples.start : samples.stop]


def test_a_crash_at_any_step_heals_and_no_reader_sees_half_a_shard(
    tmp_path: Path, finish: Any, undisturbed: Any, manifest: Manifest, packed: list[bytes]
) -> None:
    folder, seen = tmp_path / "cache", 0
    for _ in crashes(lambda: finish(folder)):
        names = contents(folder) if folder.exists() else {}
        whole = names.get("journal.jsonl", b"").count(b"\n") == manifest.shards
        check_reader(folder, packed, whole)
        finish(folder)
        assert contents(folder) == undisturbed
        check_reader(folder, packed, whole=True)
        shutil.rmtree(folder)
        seen += 1
    assert seen > 30  # or the crashes were not where the writing is


def test_a_crash_at_every_step_in_turn_heals(tmp_path: Path, finish: Any, undisturbed: Any) -> None:
    """Each start goes on from what the one before left, and comes one call further."""
    folder = tmp_path / "cache"
    for step in crashes(lambda: finish(folder)):
        assert step < 200, "it does not come to an end"
    assert contents(folder) == undisturbed


def test_a_crash_while_another_cache_is_overwritten_heals(
    tmp_path: Path, finish: Any, undisturbed: Any, make_manifest: Any, records_of: Any
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


def test_overwriting_deletes_nothing_that_is_not_the_caches(tmp_path: Path, finish: Any, make_manifest: Any) -> None:
    folder, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    CacheWriter(folder, make_manifest(seed=1))
    elsewhere.mkdir()
    for path in (folder / "notes.txt", folder / "draft.tmp", elsewhere / "000000.safetensors"):
        path.write_text("mine")
    (folder / "shards").symlink_to(elsewhere)
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
    half = "000001.safetensors.tmp"
    shard = [("write", half), ("fsync", half), ("replace", half), ("fsync", "shards")]
    assert calls == [*shard, ("write", "journal.jsonl"), ("fsync", "journal.jsonl")]


def test_a_journal_line_that_is_cut_anywhere_is_made_again(tmp_path: Path, finish: Any, undisturbed: Any) -> None:
    folder = tmp_path / "cache"
    finish(folder)
    journal = undisturbed["journal.jsonl"]
    last = journal[:-1].rfind(b"\n") + 1
    for end in [*range(last, len(journal), 40), len(journal) - 1]:
        (folder / "journal.jsonl").write_bytes(journal[:end])
        with pytest.raises(UserError, match="1 of 3 shards to go"):
            CacheReader(folder, "train")
        finish(folder)
        assert contents(folder) == undisturbed


def test_the_order_of_the_work_leaves_no_trace(
    tmp_path: Path, manifest: Manifest, records_of: Any, undisturbed: Any
) -> None:
    folder = tmp_path / "cache"
    writer = CacheWriter(folder, manifest)
    save_tokenizer(folder, Tokenizer())
    for shard in (2, 0, 1):
        writer.write(shard, records_of(manifest, shard))
    assert contents(folder) == undisturbed
    lines = undisturbed["journal.jsonl"].splitlines(keepends=True)
    (folder / "journal.jsonl").write_bytes(b"".join(reversed(lines)))
    seal(folder)
    assert contents(folder) == undisturbed


# Disks.


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_full_disk_ends_the_run_with_a_message_and_the_run_goes_on_later(
    call: str, tmp_path: Path, finish: Any, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full at the first call of this kind, at the second, and so on."""
    real = getattr(os, call)
    for step in itertools.count():
        folder, count = tmp_path / f"cache{step}", itertools.count()

        def full(*arguments: Any, step: int = step, count: Any = count, **options: Any) -> Any:
            if next(count) >= step and (call != "open" or arguments[1] & os.O_WRONLY):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            try:
                finish(folder)
                break
            except UserError as error:
                said = str(error)
        assert "disk full" in said and "run the same command again" in said and "\n" not in said
        assert not list(folder.rglob("0*.tmp")), "the half shard takes room"
        finish(folder)
        assert contents(folder) == undisturbed
    assert step > 3


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EIO, errno.EROFS])
def test_other_errors_of_a_disk_say_what_they_are(
    code: int, tmp_path: Path, manifest: Manifest, records_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CacheWriter(tmp_path, manifest)

    def broken(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, "_write_all", broken)
    with pytest.raises(UserError, match=os.strerror(code)):
        writer.write(0, records_of(manifest, 0))
    assert writer.missing() == [0, 1, 2]


@pytest.fixture(scope="module")
def command(world: Any, distill: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, bytes]]:
    """`distill cache-teacher FILE`, and the cache that it makes undisturbed."""
    folder = tmp_path_factory.mktemp("command")
    command = ["cache-teacher", world.write(folder / "experiment.yaml", cache={"shard_samples": 4})]
    distill(*command).done()
    return command, contents(folder / "run" / "cache")


def test_the_command_survives_a_full_disk(
    command: Any, distill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, expected = command
    real, writes = files._write_all, itertools.count()

    def full(descriptor: int, content: bytes) -> None:
        if next(writes) >= 12:
            real(descriptor, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor, content)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_write_all", full)
        distill(*arguments, "--cache.dir", tmp_path).refused("disk full", "kept", "MB", "run the same command again")
    assert 0 < len(read_journal(tmp_path)) < read_manifest(tmp_path).shards
    distill(*arguments, "--cache.dir", tmp_path).done()
    assert contents(tmp_path) == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(kilobytes)`: a file system of that size; called again, it has another one."""
    mount = tmp_path / "disk"
    mount.mkdir()
    mounted = []

    def resize(kilobytes: int) -> Path:
        options = f"size={kilobytes}k" + (",remount" if mounted else "")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(mount)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no small file system here: {done.stderr.decode().strip()}")
        mounted.append(True)
        return mount

    yield resize
    if mounted:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.skipif(not shutil.which("mount") or os.name == "nt", reason="needs mount")
def test_the_command_survives_a_small_disk(command: Any, distill: Any, small_disk: Any) -> None:
    arguments, expected = command
    size = sum(len(content) // 4096 * 4 + 4 for content in expected.values())
    refused = 0
    for kilobytes in (16, size // 4, size // 2, size - 12):
        disk = small_disk(kilobytes)
        distill(*arguments, "--cache.dir", disk / "cache").refused("disk full", "run the same command again")
        refused += 1
    distill(*arguments, "--cache.dir", small_disk(size + 4096) / "cache").done()
    assert contents(disk / "cache") == expected and refused == 4


def test_two_processes_cannot_write_one_cache(tmp_path: Path, command: Any, distill: Any) -> None:
    arguments, _ = command
    with sole_writer(tmp_path):
        distill(*arguments, "--cache.dir", tmp_path).refused("another process is writing here")
    assert contents(tmp_path) == {}


# The tokenizer.


def test_the_tokenizer_does_not_say_how_it_was_found(tmp_path: Path) -> None:
    """Or a cache made without a network would be another one."""
    save_tokenizer(tmp_path, Tokenizer())
    assert "is_local" not in (checked_tokenizer(tmp_path) / "tokenizer_config.json").read_text()


def test_a_changed_tokenizer_is_not_used_and_is_written_anew(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, Tokenizer())
    before = contents(tmp_path)
    for name, content in before.items():
        for changed in (b"", content[:-1], bytes([content[0] ^ 1]) + content[1:], content + b"x", None):
            if changed is None:
                (tmp_path / name).unlink()
            else:
                (tmp_path / name).write_bytes(changed)
            assert tokenizer_problems(tmp_path)
            with pytest.raises(UserError, match="tokenizer"):
                checked_tokenizer(tmp_path)
            save_tokenizer(tmp_path, Tokenizer())
            assert contents(tmp_path) == before


def test_kills_at_random_instants_change_nothing() -> None:
    """The real command, from start to end; tests/benchmarks/kill_storm.py throws as many kills as one likes."""
    storm = [sys.executable, str(BENCHMARKS / "kill_storm.py"), "--kills", "50"]
    done = subprocess.run(storm, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "50  kills" in done.stdout
