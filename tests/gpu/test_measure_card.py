"""The script that measures a card runs through on a CPU with tiny shapes: a first card finds no mistake in it."""

from __future__ import annotations

from pathlib import Path

import bench
import measure_card
import pytest
import torch
from paired import Row, Setup

from distill.cli import main


def here(*arguments: str) -> None:
    """Run a command in this process."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert not ended.value.code


def test_without_a_card_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA" in (measure_card.why_not("cuda") or "")
    assert measure_card.why_not("cpu") is None


def test_every_recipe_and_every_row_has_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """The first recipe runs; the others, and the benchmarks of other tests, find no time left."""
    measured: list[str] = []

    def apart(name: str, setup: Setup, limit: float) -> bench.Found:
        measured.append(name)
        return bench.Found([], "no time was left")

    monkeypatch.setattr(bench, "measure_apart", apart)
    monkeypatch.setattr(measure_card, "RECIPES", measure_card.RECIPES[:1])
    rows = list(measure_card.measure(Setup("cpu", tiny=True), float("inf"), tmp_path, here))
    assert measured == list(bench.BENCHES)
    recipe = [row for row in rows if row.bench == "forecast"]
    assert {row.measure.split(",")[0] for row in recipe} >= {
        "cache-teacher: peak host memory",
        "cache-teacher: time",
        "cache-teacher: size on disk",
        "train-student: peak host memory",
        "train-student: time",
    }
    assert all(row.ratio is not None and row.ratio > 0 for row in recipe)


@pytest.mark.parametrize("name", measure_card.RECIPES)
def test_a_recipe_is_measured_with_shapes_that_are_here(name: str, tmp_path: Path) -> None:
    content = measure_card.experiment(name, Setup("cpu", tiny=True), tmp_path)
    for model in (content["teacher"]["model"], content["student"]["options"]["model"]):
        assert (Path(model) / "model.safetensors.index.json").exists(), model
    assert Path(content["corpus"]["path"]).exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here")
def test_the_first_recipe_runs_on_the_card(tmp_path: Path) -> None:
    found: list[Row] = list(measure_card.recipe_rows("smollm2-1.7b-to-360m-6gb", Setup("cuda", True), tmp_path, here))
    assert any("device memory" in row.measure for row in found)
