"""Writing: whatever a start finds, the finished cache is byte for byte that of an undisturbed run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from distill.cache.format.folder import JOURNAL, MANIFEST, Manifest
from distill.cache.format.records import Record
from distill.cache.making.writer import CacheWriter
from distill.errors import UserError


def shard_file(shard: int, held_out: int = 2) -> str:
    """Return the name of a shard of a cache with so many shards of held-out samples."""
    split, number = ("held_out", shard) if shard < held_out else ("train", shard - held_out)
    return f"shards/{split}-{number:06d}.safetensors"


ROOT = Path(__file__).resolve().parents[3]
RecordsOf = Callable[[Manifest, int], list[Record]]
MakeManifest = Callable[..., Manifest]


def finish(folder: Path, manifest: Manifest, records_of: RecordsOf, shards: int | None = None) -> list[int]:
    """Open the cache and write what is missing (at most `shards` of it); returns the shards that were written."""
    writer = CacheWriter(folder, manifest)
    missing = writer.missing()[:shards]
    for shard in missing:
        writer.write(shard, records_of(manifest, shard))
    return missing


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, make_manifest: MakeManifest, records_of: RecordsOf) -> Path:
    """A finished cache of seven shards."""
    folder = tmp_path_factory.mktemp("undisturbed") / "cache"
    assert finish(folder, make_manifest(), records_of) == [*range(7)]
    return folder


def test_a_finished_cache_has_nothing_missing(undisturbed: Path, make_manifest: MakeManifest) -> None:
    before = content(undisturbed)
    assert CacheWriter(undisturbed, make_manifest()).missing() == []
    assert content(undisturbed) == before
    assert set(before) == {MANIFEST, JOURNAL, *map(shard_file, range(7))}


@pytest.mark.parametrize("shards", [0, 1, 6])
def test_a_second_start_continues(
    tmp_path: Path, undisturbed: Path, make_manifest: MakeManifest, records_of: RecordsOf, shards: int
) -> None:
    finish(tmp_path / "cache", make_manifest(), records_of, shards)
    assert finish(tmp_path / "cache", make_manifest(), records_of) == [*range(shards, 7)]
    assert content(tmp_path / "cache") == content(undisturbed)


def test_a_torn_line_at_any_byte(
    tmp_path: Path, undisturbed: Path, make_manifest: MakeManifest, records_of: RecordsOf
) -> None:
    lines = (undisturbed / JOURNAL).read_bytes()
    last = lines.rstrip(b"\n").rfind(b"\n") + 1
    for cut in [*range(last, len(lines), 13), len(lines) - 1]:
        folder = tmp_path / f"cut-{cut}"
        shutil.copytree(undisturbed, folder)
        (folder / JOURNAL).write_bytes(lines[:cut])
        assert finish(folder, make_manifest(), records_of) == [6]
        assert content(folder) == content(undisturbed)


@pytest.mark.parametrize("shard", [0, 3, 6])
def test_a_missing_shard_is_made_again(
    tmp_path: Path, undisturbed: Path, make_manifest: MakeManifest, records_of: RecordsOf, shard: int
) -> None:
    shutil.copytree(undisturbed, tmp_path / "cache")
    (tmp_path / "cache" / shard_file(shard)).unlink()
    assert finish(tmp_path / "cache", make_manifest(), records_of) == [shard]
    assert content(tmp_path / "cache") == content(undisturbed)


def test_what_kills_left_half_written_goes_at_the_next_start(
    tmp_path: Path, undisturbed: Path, make_manifest: MakeManifest
) -> None:
    shutil.copytree(undisturbed, tmp_path / "cache")
    for name in (MANIFEST, JOURNAL, shard_file(3)):
        (tmp_path / "cache" / f"{name}.tmp").write_bytes(b"half")
    CacheWriter(tmp_path / "cache", make_manifest())
    assert content(tmp_path / "cache") == content(undisturbed)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_end_at_any_call_to_the_disk(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Path,
    make_manifest: MakeManifest,
    records_of: RecordsOf,
    when: str,
) -> None:
    """The process ends before or after its n-th write, sync or rename, for every n; the next start completes it."""
    calls = [0, 0]  # so far, and the one that kills

    def deadly(original: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            calls[0] += 1
            if calls[0] == calls[1] and when == "before":
                raise Killed
            this = calls[0]
            try:
                return original(*arguments, **options)
            finally:
                if this == calls[1]:
                    raise Killed

        return call

    manifest, ended = make_manifest(samples=7), False
    finish(tmp_path / "expected", manifest, records_of)
    kill_at = 0
    while not ended:
        kill_at += 1
        folder = tmp_path / f"end-{kill_at}"
        calls[:] = [0, kill_at]
        with monkeypatch.context() as patch:
            for name in ("write", "fsync", "replace", "open"):
                patch.setattr(os, name, deadly(getattr(os, name)))
            try:
                finish(folder, manifest, records_of)
                ended = True
            except Killed:
                pass
        finish(folder, manifest, records_of)
        assert content(folder) == content(tmp_path / "expected"), f"after call {kill_at}"
    assert kill_at > 15


SCRIPT = """
import importlib.util, os, random, signal, sys, time
from pathlib import Path
from distill.cache.format.folder import read_journal, read_manifest
from distill.cache.making.writer import CacheWriter

spec = importlib.util.spec_from_file_location("helpers", sys.argv[1])
helpers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helpers)
folder = Path(sys.argv[2])
manifest = read_manifest(folder)
scheme = manifest.make_scheme()

def finish():
    writer = CacheWriter(folder, manifest)
    for shard in writer.missing():
        samples = manifest.shard_range(shard)
        writer.write(shard, [helpers.random_record(n, scheme, share=0 if n % 3 == 2 else 0.6) for n in samples])

chance, journal = random.Random(0), folder / "journal.jsonl"
for _ in range(8):
    before = journal.stat().st_size
    process = os.fork()  # cheaper than another interpreter
    if not process:
        finish()
        os._exit(0)
    while journal.stat().st_size == before:
        time.sleep(0.0005)
    time.sleep(chance.random() * 0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    print(len(CacheWriter(folder, manifest).missing()), flush=True)
finish()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments(tmp_path: Path, make_manifest: MakeManifest, records_of: RecordsOf) -> None:
    """Real processes, killed without warning while they write; the last one is left to finish."""
    manifest = make_manifest(samples=160, shard_samples=2)
    finish(tmp_path / "expected", manifest, records_of)
    CacheWriter(tmp_path / "cache", manifest)
    arguments = [sys.executable, "-c", SCRIPT, str(Path(__file__).parents[1] / "conftest.py"), str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout
    left = [81, *map(int, out.split())]
    assert len(left) == 9 and all(after < before for before, after in pairwise(left)), "work was lost"
    assert left[-1] > 0, "it was done before it was killed"
    assert content(tmp_path / "cache") == content(tmp_path / "expected")


def changed_manifests(make_manifest: MakeManifest) -> dict[str, Manifest]:
    manifest = make_manifest()
    return {
        "seed": make_manifest(seed=1),
        "temperature": make_manifest(temperature=2.0),
        "vocab_size": make_manifest(vocab_size=1010),
        "pack": make_manifest(pack=False),
        "scheme_parameters.threshold": make_manifest(scheme_parameters={"threshold": 0.1, "draws": 1}),
        "splits.train": make_manifest(samples=12),
        **{
            f"fingerprints.{name}": make_manifest(fingerprints={**manifest.fingerprints, name: "b" * 64})
            for name in manifest.fingerprints
        },
    }


def test_another_cache_is_refused_and_left_alone(
    tmp_path: Path, undisturbed: Path, make_manifest: MakeManifest
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(undisturbed, folder)
    for field, manifest in changed_manifests(make_manifest).items():
        with pytest.raises(UserError, match=rf"made from something else.*\b{field}: expected .*, found .*overwrite"):
            CacheWriter(folder, manifest)
        assert content(folder) == content(undisturbed)


def test_versions_of_libraries_are_not_compared(undisturbed: Path, make_manifest: MakeManifest) -> None:
    before = content(undisturbed)
    assert CacheWriter(undisturbed, make_manifest(made_with={"torch": "3"})).missing() == []
    assert content(undisturbed) == before


def test_overwrite_begins_anew(
    tmp_path: Path, undisturbed: Path, make_manifest: MakeManifest, records_of: RecordsOf
) -> None:
    folder, manifest = tmp_path / "cache", make_manifest(seed=1, samples=9)
    shutil.copytree(undisturbed, folder)
    assert CacheWriter(folder, manifest, overwrite=True).missing() == [0, 1, 2]
    finish(folder, manifest, records_of)
    finish(tmp_path / "fresh", manifest, records_of)
    assert content(folder) == content(tmp_path / "fresh")


def test_overwrite_keeps_the_same_cache(tmp_path: Path, undisturbed: Path, make_manifest: MakeManifest) -> None:
    shutil.copytree(undisturbed, tmp_path / "cache")
    assert CacheWriter(tmp_path / "cache", make_manifest(), overwrite=True).missing() == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, make_manifest: MakeManifest, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"not a cache, and not empty"):
        CacheWriter(tmp_path, make_manifest(), overwrite)
    assert content(tmp_path) == {"thesis.tex": b"years of work"}


def test_overwrite_takes_nothing_but_a_cache_away(tmp_path: Path, make_manifest: MakeManifest) -> None:
    """Other programs too have a manifest.json."""
    (tmp_path / MANIFEST).write_text('{"name": "my web page"}')
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError):
        CacheWriter(tmp_path, make_manifest())
    try:
        CacheWriter(tmp_path, make_manifest(), overwrite=True)
    except UserError:
        assert content(tmp_path)[MANIFEST] == b'{"name": "my web page"}'
    assert content(tmp_path)["thesis.tex"] == b"years of work"


def test_an_empty_folder_is_taken(tmp_path: Path, make_manifest: MakeManifest) -> None:
    assert CacheWriter(tmp_path, make_manifest()).missing() == [*range(7)]


def test_a_folder_that_cannot_be_made(tmp_path: Path, make_manifest: MakeManifest) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the cache here"):
        CacheWriter(tmp_path / "file" / "cache", make_manifest())
