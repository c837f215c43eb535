"""A cache of a stream: parts agree on every token, it grows as if made in one go, and a student is measured on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from distill.corpus import streams, windows
from distill.forecast import sizes

SMALL = ["--cache.max_samples", 12, "--cache.shard_samples", 4, "--cache.held_out_samples", 2]
LARGE = ["--cache.max_samples", 24, "--cache.shard_samples", 4, "--cache.held_out_samples", 2]


@pytest.fixture
def cache(world: Any, distill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`cache("12", *SMALL)`: cache a data set of 30 files, as one of the hub, in the folder of that name."""
    for number in range(30):
        texts = [f"file {number}, row {row}: the people of this country " + "work " * (row % 9) for row in range(20)]
        path = tmp_path / f"set/train-{number:05d}-of-00030.parquet"
        path.parent.mkdir(exist_ok=True)
        pa.parquet.write_table(pa.table({"text": texts}), path)
    for module in (streams, sizes):
        monkeypatch.setattr(module, "local_files", lambda path, *rest: None)
    monkeypatch.setattr(windows, "ROWS", 30)
    file = world.write(tmp_path / "experiment.yaml", corpus={"path": str(tmp_path / "set"), "held_out": 0.2})

    def run(name: str, *arguments: Any, command: str = "cache-teacher") -> Any:
        return distill(command, file, "--cache.dir", tmp_path / name, *arguments)

    return run


def test_a_cache_of_a_stream_grows_to_the_one_made_in_one_go(
    cache: Callable[..., Any], contents: Any, untouched: Any, tmp_path: Path
) -> None:
    assert "12 of 12 training samples" in cache("small", *SMALL).done().out
    fingerprints = json.loads((tmp_path / "small/manifest.json").read_text())["fingerprints"]
    assert "windows of 30 rows" in fingerprints["reading"] and "held_out_order" not in fingerprints
    cache("large", *LARGE).done()
    shards = {path.name: path.read_bytes() for path in (tmp_path / "small/shards").iterdir()}
    assert len(shards) == 4
    assert "4 of 7 shards are there; continuing" in cache("small", *LARGE).done().out
    assert contents(tmp_path / "small") == contents(tmp_path / "large")
    assert all((tmp_path / "small/shards" / name).read_bytes() == content for name, content in shards.items())
    assert "nothing to do" in cache("small", *LARGE).done().out


def test_parts_agree_on_every_token(
    cache: Callable[..., Any], distill: Any, contents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    cache("whole", *SMALL).done()
    for part in (1, 2):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / f"machine {part}")
        cache(f"part{part}", *SMALL, "--cache.part", f"{part}/2").done()
    distill("merge", tmp_path / "part1", tmp_path / "part2", "--to", tmp_path / "merged").done()
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")


def test_a_student_of_a_stream_is_trained_and_measured(cache: Callable[..., Any], tmp_path: Path) -> None:
    steps = ["--train.max_steps", 1, "--evaluate.cost", "false", "--evaluate.texts", 0]
    cache("small", *SMALL).done()
    cache("small", *SMALL, *steps, command="train-student").done()
    cache("small", *SMALL, *steps, command="evaluate").done()
    assert '"documents": ' in (tmp_path / "run/evaluation.json").read_text()
    cache("small", *SMALL, "--corpus.seed", 1).refused("fingerprints.corpus", "fingerprints.packing")
