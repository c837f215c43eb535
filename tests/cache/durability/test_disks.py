"""Full, small and broken disks, a second writer, a changed tokenizer: said in a line, and nothing is lost."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.cache.format.folder import Manifest, read_journal, read_manifest
from distill.cache.format.tokenizer_files import checked_tokenizer, save_tokenizer, tokenizer_problems
from distill.cache.making.writer import CacheWriter
from distill.errors import UserError
from distill.system import files
from distill.system.locks import sole_writer


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_full_disk_ends_the_run_with_a_message_and_the_run_goes_on_later(
    call: str, tmp_path: Path, finish: Any, undisturbed: Any, monkeypatch: pytest.MonkeyPatch, contents: Any
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
    assert writer.missing() == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def command(
    world: Any, distill: Any, tmp_path_factory: pytest.TempPathFactory, contents: Any
) -> tuple[list[str], dict[str, bytes]]:
    """`distill cache-teacher FILE`, and the cache that it makes undisturbed."""
    folder = tmp_path_factory.mktemp("command")
    command = ["cache-teacher", world.write(folder / "experiment.yaml", cache={"shard_samples": 4})]
    distill(*command).done()
    return command, contents(folder / "run" / "cache")


def test_the_command_survives_a_full_disk(
    command: Any, distill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: Any
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
        distill(*arguments, "--cache.dir", tmp_path).refused(
            "disk full", "kept", "free about", "kB", "run the same command again"
        )
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
def test_the_command_survives_a_small_disk(command: Any, distill: Any, small_disk: Any, contents: Any) -> None:
    arguments, expected = command
    size = sum(len(content) // 4096 * 4 + 4 for content in expected.values())
    refused = 0
    for kilobytes in (16, size // 4, size // 2, size - 12):
        disk = small_disk(kilobytes)
        distill(*arguments, "--cache.dir", disk / "cache").refused("disk full", "run the same command again")
        refused += 1
    distill(*arguments, "--cache.dir", small_disk(size + 4096) / "cache").done()
    assert contents(disk / "cache") == expected and refused == 4


def test_two_processes_cannot_write_one_cache(tmp_path: Path, command: Any, distill: Any, contents: Any) -> None:
    arguments, _ = command
    with sole_writer(tmp_path):
        distill(*arguments, "--cache.dir", tmp_path).refused("another process is writing here")
    assert contents(tmp_path) == {}


def test_the_tokenizer_does_not_say_how_it_was_found(tmp_path: Path, tokenizer: Any) -> None:
    """Or a cache made without a network would be another one."""
    save_tokenizer(tmp_path, tokenizer)
    assert "is_local" not in (checked_tokenizer(tmp_path) / "tokenizer_config.json").read_text()


def test_a_changed_tokenizer_is_not_used_and_is_written_anew(tmp_path: Path, contents: Any, tokenizer: Any) -> None:
    save_tokenizer(tmp_path, tokenizer)
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
            save_tokenizer(tmp_path, tokenizer)
            assert contents(tmp_path) == before
