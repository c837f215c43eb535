"""Bad rows are refused all together, or left out and counted; a row that was there before is left out and counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.corpus import selecting


def test_a_run_with_duplicates_is_measured_on_the_text_that_it_held_out(
    world: Any, distill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cache, of a release that kept duplicates, is elsewhere by then."""
    lines = (world.folder / "corpus.jsonl").read_text().splitlines()
    (tmp_path / "twice.jsonl").write_text("\n".join([*lines, *lines[:12]]))
    corpus = {"path": str(tmp_path / "twice.jsonl")}
    file = world.write(tmp_path / "experiment.yaml", corpus=corpus, train={"max_steps": 1}, cache={"max_samples": 8})
    with monkeypatch.context() as earlier:
        earlier.setattr(selecting, "find_duplicates", lambda hashes, kept: np.zeros(len(hashes), dtype=bool))
        distill("cache-teacher", file).done()
        distill("train-student", file).done()
    assert "nothing to do" in distill("cache-teacher", file).done().out, "it goes on with its duplicates"
    cache = tmp_path / "run/cache"
    made_from = json.loads((cache / "manifest.json").read_text())["fingerprints"]["corpus"]
    shutil.rmtree(cache)
    distill("evaluate", file).done()
    assert json.loads((tmp_path / "run/evaluation.json").read_text())["fingerprints"]["corpus"] == made_from


def test_bad_rows_are_told_together_or_left_out_and_counted(world: Any, distill: Any, tmp_path: Path) -> None:
    file = world.write(tmp_path / "experiment.yaml", cache={"max_samples": 8})
    good = (world.folder / "corpus.jsonl").read_text().splitlines()
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([*good[:20], '{"text": 3}', "{", *good[20:], good[0]]))
    own = ["cache-teacher", file, "--corpus.path", path]
    distill(*own).refused("2 of 43 rows", "row 21", "row 22", "not JSON", "corpus.bad_rows skip")
    assert not (tmp_path / "run/cache").exists()
    out = distill(*own, "--corpus.bad_rows", "skip").done().out
    assert "40 documents (" in out and "3 rows left out: 1 column '…' is int, not text, 1 not JSON" in out
    manifest = json.loads((tmp_path / "run/cache/manifest.json").read_text())
    assert manifest["made_with"]["rows left out"].endswith("1 exact duplicate")
    assert "nothing to do" in distill("cache-teacher", file).done().out, "it is the cache of the good rows alone"
