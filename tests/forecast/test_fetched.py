"""Checkpoints that are still to come from the hub take disk and time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distill.experiment.file import load_experiment
from distill.forecast import room
from distill.forecast.fetched import fetched, notes_of
from distill.forecast.phases.simulator import PHASES
from distill.forecast.published import published_models


def test_checkpoints_of_the_hub_take_room_until_they_are_here(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    teacher, student = "openai/gpt-oss-20b", "Qwen/Qwen3-0.6B"
    file = world.write(
        tmp_path / "experiment.yaml",
        teacher={"model": teacher},
        student={"class_path": "huggingface", "options": {"model": student}},
    )
    experiment = load_experiment(file, [])
    found = fetched(experiment, PHASES)
    assert found.keys() == {teacher, student} == {*fetched(experiment, PHASES[:1]), *fetched(experiment, PHASES[1:2])}
    assert 12.5e9 < found[teacher] < 14.5e9, "13.8 GB in MXFP4"
    assert found[student] == 2 * published_models()[student].parameters
    needs = {need.what: need for need in room.needs(experiment, {"fetched models": 7}, None)}
    assert needs["models of the hub"].folder == hub and needs["models of the hub"].bytes == 7
    blobs = hub / "models--Qwen--Qwen3-0.6B/blobs"
    blobs.mkdir(parents=True)
    (blobs / "ab.incomplete").write_bytes(bytes(1000))
    assert fetched(experiment, PHASES)[student] == found[student] - 1000
    here = load_experiment(file, ["--teacher.model", world.content["teacher"]["model"]])
    assert fetched(here, PHASES).keys() == {student}


def test_the_time_of_both_is_told() -> None:
    fetching, copying = notes_of({"a/b": 12_500_000_000}, 70_000_000 * 120)
    assert "a/b 12.5 GB; about 16 min" in fetching or "17 min" in fetching
    assert "its quantised copy is made once" in copying and "2 min" in copying
    assert notes_of({}, 0) == []
