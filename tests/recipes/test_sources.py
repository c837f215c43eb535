"""An experiment of several sources: a cache that knows their weights, and each source counted apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def mixed(world: Any, tmp_path: Path) -> str:
    """An experiment of the world's texts beside conversations."""
    chats = [{"prompt": f"Question {number}?", "completion": f"Yes, {number} times."} for number in range(60)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    texts = {"path": world.content["corpus"]["path"], "weight": 2}
    sources = [texts, {"path": str(tmp_path / "chats.jsonl"), "weight": 1, "limit": 50}]
    corpus = {"path": None, "sources": sources, "sequence_length": 64, "held_out": 0.3}
    return str(world.write(tmp_path / "experiment.yaml", corpus=corpus))


def test_sources_are_told_apart_and_their_weights_are_the_caches(distill: Any, mixed: str, tmp_path: Path) -> None:
    shown = distill("preview", mixed, "--samples", 0).done().out
    out = distill("cache-teacher", mixed, "--cache.max_samples", 8).done().out
    for text in (shown, out):
        assert "corpus.jsonl: " in text and "chats.jsonl: " in text and "beyond its weight" in text
    manifest = json.loads((tmp_path / "run/cache/manifest.json").read_text())
    assert manifest["fingerprints"]["mixture"] == "weights 2, 1"
    assert manifest["sources"] == ["corpus.jsonl", "chats.jsonl"]
    other = Path(mixed).read_text().replace("weight: 1", "weight: 5")
    Path(mixed).write_text(other)
    distill("cache-teacher", mixed, "--cache.max_samples", 8).refused("mixture", "weights 2, 5", "weights 2, 1")
    distill("train-student", mixed).refused("mixture", "weights 2, 1")


def test_each_source_is_measured_apart(distill: Any, mixed: str, tmp_path: Path) -> None:
    distill("run", mixed, "--train.max_steps", 2, "--cache.max_samples", 16).done()
    result = json.loads((tmp_path / "run/evaluation.json").read_text())
    for model in ("teacher", "student"):
        found = result["fidelity"][model]
        texts, chats = found["by_source"]
        assert (texts["source"], chats["source"]) == ("corpus.jsonl", "chats.jsonl")
        assert texts["positions"] + chats["positions"] == result["text"]["tokens"]
        mean = (texts["nll"] * texts["positions"] + chats["nll"] * chats["positions"]) / result["text"]["tokens"]
        assert mean == pytest.approx(found["nll"]) and texts["nll"] != chats["nll"]
    sources = result["corpus"]["sources"]
    assert sources["chats.jsonl"]["rows"] == 50 and sources["corpus.jsonl"]["left_out"]["beyond its weight"] > 0
    page = (tmp_path / "run/report.html").read_text()
    assert "Each source apart" in page and "beyond its weight" in page
