"""`distill inspect`: what is in a cache, and whether it is whole."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distill import cli


@pytest.fixture
def cache(finished: Any, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(finished.cache, tmp_path / "cache"))


def test_it_says_what_the_cache_is(finished: Any, distill: Any, untouched: Any) -> None:
    before = untouched(finished.cache)
    out = distill("inspect", finished.cache).done().out
    manifest = json.loads((finished.cache / "manifest.json").read_text())
    for words in ("varopt", "threshold 0.02", "samples of 48 tokens", "400 tokens", "bytes a position"):
        assert words in out, words
    assert all(value in out for value in manifest["fingerprints"].values())
    assert all(f"{name}" in out for name in ("held_out", "train", "torch", "transformers"))
    assert untouched(finished.cache) == before


def test_a_whole_cache_is_verified(finished: Any, distill: Any) -> None:
    out = distill("inspect", finished.cache, "--verify").done().out
    shards = len((finished.cache / "journal.jsonl").read_text().splitlines())
    assert f"{shards} shards whole, 0 not" in out


def test_a_flipped_bit_and_a_missing_shard_are_found(cache: Path, distill: Any) -> None:
    flipped, missing = cache / "shards/train-000000.safetensors", cache / "shards/train-000002.safetensors"
    content = bytearray(flipped.read_bytes())
    content[-5] ^= 1
    flipped.write_bytes(content)
    missing.unlink()
    outcome = distill("inspect", cache, "--verify")
    assert outcome.status == 1
    assert (
        "train-000000.safetensors has changed" in outcome.out and "train-000002.safetensors is missing" in outcome.out
    )
    assert "2 not" in outcome.out


def test_what_is_no_cache_is_refused(distill: Any, tmp_path: Path, cache: Path) -> None:
    distill("inspect", tmp_path / "nowhere").refused("nowhere", "no such folder")
    (tmp_path / "empty").mkdir()
    distill("inspect", tmp_path / "empty").refused("no cache here", "distill cache-teacher")
    (cache / "manifest.json").write_text("{")
    distill("inspect", cache).refused("manifest.json")


def test_a_url_and_a_run_folder_are_inspected_like_the_cache(
    finished: Any, distill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    url = finished.cache.as_uri()
    of_folder, *of_others = (distill("inspect", place).done().out for place in (finished.cache, finished.run, url))
    for other in of_others:
        assert other.splitlines()[1:] == of_folder.splitlines()[1:]
    assert url in of_others[1]
    assert distill("inspect", url, "--sample", 1).done().out == distill("inspect", finished.cache, "--sample", 1).out
    for option in ("--verify", "--repair"):
        distill("inspect", url, option).refused(url, "copy the cache")


def test_a_run_folder_is_merged_like_its_cache(finished: Any, distill: Any, contents: Any, tmp_path: Path) -> None:
    distill("merge", finished.run, "--to", tmp_path / "merged").done()
    assert contents(tmp_path / "merged") == contents(finished.cache)


class Broken(io.StringIO):
    """The output of `| true`, whose reader has ended."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize(
    ("command", "made"),
    [("merge", "whole/manifest.json"), ("export", "folder/config.json"), ("compare", "page.html")],
)
@pytest.mark.usefixtures("no_traces")
def test_a_broken_output_does_not_end_what_writes(finished: Any, tmp_path: Path, command: str, made: str) -> None:
    given = {
        "merge": [finished.cache, "--to", tmp_path / "whole"],
        "export": [finished.run, "--to", tmp_path / "folder"],
        "compare": [finished.run, tmp_path / "other", "--to", tmp_path / "page.html"],
    }
    shutil.copytree(finished.run, tmp_path / "other", ignore=shutil.ignore_patterns("cache", "checkpoints"))
    with contextlib.redirect_stdout(Broken()), pytest.raises(SystemExit) as ended:
        cli.main([command, *map(str, given[command])])
    assert ended.value.code == 0 and (tmp_path / made).exists()
