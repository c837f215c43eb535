"""The choice behind `auto`: made once, by what the machine does fast, and kept by every later start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.cache.format.folder import read_manifest
from distill.experiment.file import load_experiment
from distill.experiment.precision import with_types_of_card, with_types_of_machine
from distill.models import devices

AUTO: dict[str, Any] = {"train": {"precision": "auto", "max_steps": 2}, "teacher": {"compute_dtype": "auto"}}
SMALL = ["--cache.max_samples", "8"]


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set the speed of bfloat16, in float32's, that this processor is measured with."""
    return lambda factor: monkeypatch.setattr(devices, "bfloat16_speed", lambda: factor)


@pytest.mark.parametrize(
    ("is_cuda", "has_bf16", "dtype", "precision"),
    [
        (True, True, "bfloat16", "bf16-mixed"),
        (True, False, "float16", "16-mixed"),
        (False, True, "float32", "32-true"),
    ],
)
def test_a_card_that_is_named_decides_by_its_properties(
    world: Any, tmp_path: Path, is_cuda: bool, has_bf16: bool, dtype: str, precision: str
) -> None:
    experiment = load_experiment(world.write(tmp_path / "a.yaml", **AUTO), [])
    chosen = with_types_of_card(experiment, is_cuda, has_bf16)
    assert (chosen.teacher.compute_dtype, chosen.train.precision) == (dtype, precision)
    given = load_experiment(world.write(tmp_path / "a.yaml", train={"precision": "bf16-true"}), [])
    assert with_types_of_card(given, is_cuda, has_bf16).train.precision == "bf16-true"


@pytest.mark.parametrize(("factor", "dtype"), [(2.0, "bfloat16"), (1.1, "float32"), (0.1, "float32")])
def test_a_processor_decides_by_measurement(speed: Any, factor: float, dtype: str) -> None:
    speed(factor)
    assert devices.compute_dtype("auto", torch.device("cpu")) == dtype
    assert devices.compute_dtype("float16", torch.device("cpu")) == "float16"


def test_the_measurement_is_a_positive_ratio() -> None:
    assert 0 < devices.bfloat16_speed() < float("inf")


def test_the_first_start_records_its_choice_and_another_machine_keeps_to_it(
    world: Any, distill: Any, speed: Any, tmp_path: Path
) -> None:
    """Resuming, repairing and evaluating where float32 is faster goes on in the types of the first machine."""
    file = world.write(tmp_path / "a.yaml", **AUTO)
    speed(3.0)
    said = distill("cache-teacher", file, *SMALL).done().out
    assert "teacher.compute_dtype: auto takes bfloat16" in said and said.count("auto takes") == 1
    assert read_manifest(tmp_path / "run" / "cache").fingerprints["quantization"] == "none, bfloat16"
    speed(0.5)
    assert "auto takes" not in distill("cache-teacher", file, *SMALL).done().out
    said = distill("train-student", file).done().out
    assert "train.precision: auto takes 32-true" in said and said.count("auto takes") == 1
    speed(3.0)
    settings = json.loads((tmp_path / "run" / "student" / "settings.json").read_text())
    assert settings["train"]["precision"] == "32-true"
    assert "is trained; nothing to do" in distill("train-student", file).done().out
    assert "auto takes" not in distill("evaluate", file, "--evaluate.max_samples", "2").done().out
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result["experiment"]["train"]["precision"] == "32-true"
    assert result["fingerprints"]["quantization"] == result["experiment"]["teacher"]["compute_dtype"].join(
        ["none, ", ""]
    )
    speed(0.5)
    begun = with_types_of_machine(load_experiment(file, ["--cache.overwrite", "true"]))
    assert begun.teacher.compute_dtype == "bfloat16", "the training remembers the cache that it was made from"


def test_a_cache_that_is_begun_anew_chooses_anew(world: Any, distill: Any, speed: Any, tmp_path: Path) -> None:
    file = world.write(tmp_path / "a.yaml", **AUTO)
    speed(3.0)
    distill("cache-teacher", file, *SMALL).done()
    speed(0.5)
    distill("cache-teacher", file, *SMALL, "--cache.overwrite", "true").done()
    assert read_manifest(tmp_path / "run" / "cache").fingerprints["quantization"] == "none, float32"


@pytest.mark.parametrize(
    ("command", "more", "words"),
    [
        ("cache-teacher", ["--cache.part", "1/2"], ["cache.part", "--teacher.compute_dtype bfloat16"]),
        ("cache-teacher", ["--cache.num_nodes", "2"], ["cache.num_nodes", "--teacher.compute_dtype bfloat16"]),
    ],
)
def test_machines_that_share_a_result_must_be_told(
    world: Any, distill: Any, speed: Any, tmp_path: Path, command: str, more: list[str], words: list[str]
) -> None:
    speed(3.0)
    distill(command, world.write(tmp_path / "a.yaml", **AUTO), *more).refused("auto", *words)
    assert not (tmp_path / "run" / "cache").exists()


def test_a_training_on_several_machines_must_be_told(world: Any, distill: Any, speed: Any, tmp_path: Path) -> None:
    file = world.write(tmp_path / "a.yaml", **AUTO)
    speed(3.0)
    distill("cache-teacher", file, *SMALL).done()
    distill("train-student", file, "--train.num_nodes", "2").refused("train.num_nodes", "--train.precision bf16-mixed")


def test_a_plan_makes_the_same_choice(world: Any, distill: Any, speed: Any, tmp_path: Path) -> None:
    speed(3.0)
    file = world.write(tmp_path / "a.yaml", **AUTO)
    said = distill("plan", file).done().out
    assert "teacher.compute_dtype: auto takes bfloat16" in said and "train.precision: auto takes bf16-mixed" in said
    said = distill("plan", file, "--card", "rtx-2060").done().out
    assert "teacher.compute_dtype: auto takes float16" in said and "train.precision: auto takes 16-mixed" in said
