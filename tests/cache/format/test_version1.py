"""Caches of format version 1: read, verified and trained from; not written.

`version1/cache` was made by the last release that wrote version 1, of a tiny random teacher; `version1/expected.json`
says what that release read back.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.cache.format.folder import VERSION, Manifest, read_journal, read_manifest
from distill.cache.making.parts import merge
from distill.cache.making.repair import repair
from distill.cache.making.writer import CacheWriter
from distill.cache.reading.reader import CacheReader
from distill.cache.reading.storage import FolderStorage
from distill.cache.reading.verify import verify
from distill.errors import UserError
from distill.experiment.folders import Folders
from distill.recipes.cache_teacher import command

HERE = Path(__file__).parent / "version1"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return Path(shutil.copytree(HERE / "cache", tmp_path / "cache"))


def with_values(folder: Path, **changes: Any) -> None:
    """Write other values into the manifest, with the hash that fits."""
    content = json.loads((folder / "manifest.json").read_text())
    del content["sha256"]
    content |= changes
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    text = json.dumps({**content, "sha256": digest}, indent=2, sort_keys=True) + "\n"
    (folder / "manifest.json").write_text(text)


@pytest.mark.parametrize("split", ["held_out", "train"])
def test_samples_and_targets_are_read_as_they_were(split: str) -> None:
    reader, expected = CacheReader(HERE / "cache", split), json.loads((HERE / "expected.json").read_text())[split]
    assert len(reader) == len(expected) == {"held_out": 3, "train": 7}[split]
    for index, sample in enumerate(expected):
        batch = reader.collate([reader[index]])
        targets: Any = batch.targets
        numbers = [targets.counts_N, targets.exact_N, targets.ids_T, batch.entropy_N, batch.surprisal_N]
        text = json.dumps([batch.input_ids_BL[0].tolist(), *(column.tolist() for column in numbers)])
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == sample["digest"]
        assert targets.weights_T[:5].tolist() == pytest.approx(sample["first_weights"], abs=1e-5)
        assert float(targets.weights_T.square().sum()) == pytest.approx(sample["sum_of_squares"], abs=1e-3)
        assert reader[index].documents is None


def test_it_is_verified_and_damage_is_found(cache: Path, distill: Any) -> None:
    assert verify(cache).problems == [] and verify(cache).whole == 3
    assert "3 shards whole, 0 not" in distill("inspect", cache, "--verify").done().out
    assert "format version   1" in distill("inspect", cache).done().out
    path = cache / "shards/000001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    (problem,) = verify(cache).problems
    assert (problem.file, problem.problem) == ("shards/000001.safetensors", "has changed")
    with pytest.raises(UserError, match="restore what is damaged"):
        repair(cache)


def test_a_student_is_trained_from_it(cache: Path, world: Any, distill: Any, tmp_path: Path) -> None:
    file = world.write(
        tmp_path / "experiment.yaml",
        corpus={"sequence_length": 32},
        cache={"dir": str(cache), "shard_samples": 4},
        student={"class_path": "compact", "options": {}},
        train={"epochs": 1, "batch_size": 2},
    )
    distill("train-student", file).done()
    assert (tmp_path / "run/student").is_dir()


def as_version_2(found: Manifest) -> Manifest:
    """Return what the same experiment asks for today: its order of tokens is counted over other samples."""
    return replace(found, version=VERSION, fingerprints={**found.fingerprints, "token_order": "0" * 64})


def test_a_finished_one_is_complete(cache: Path, tmp_path: Path, capsys: Any) -> None:
    folders = Folders(tmp_path, cache, tmp_path)
    assert command._accept_version_1(folders, as_version_2(read_manifest(cache))) == 0
    assert "is complete (3 shards, format version 1); nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="seed: expected 1, found 0"):
        command._accept_version_1(folders, replace(as_version_2(read_manifest(cache)), seed=1))


def test_an_unfinished_one_is_finished_by_the_release_that_began_it(cache: Path, contents: Any) -> None:
    lines = (cache / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (cache / "journal.jsonl").write_bytes(b"".join(lines[:-1]))
    before = contents(cache)
    with pytest.raises(UserError, match=r"finish it with that release, or begin anew with --cache.overwrite true"):
        CacheWriter(cache, as_version_2(read_manifest(cache)))
    assert contents(cache) == before
    CacheWriter(cache, as_version_2(read_manifest(cache)), overwrite=True)
    assert read_manifest(cache).version == VERSION and read_journal(cache) == {}


def test_parts_are_joined_by_the_release_that_made_them(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="join its parts with the release that made them"):
        merge([FolderStorage(cache)], tmp_path / "to", lambda size: None)


@pytest.mark.parametrize(
    ("scheme", "parameters", "key"),
    [
        ("varopt", {"threshold": 0.02, "draws": 2}, "cache.draws"),
        ("random", {"entries": 20, "exponent": 0.5}, "cache.exponent"),
    ],
)
def test_draws_and_exponents_are_refused(cache: Path, scheme: str, parameters: dict[str, Any], key: str) -> None:
    with_values(cache, scheme=scheme, scheme_parameters=parameters)
    with pytest.raises(UserError, match=rf"was made with {key}, which is gone: make the cache anew, with a lower"):
        read_manifest(cache)
