"""A pretrained student named by a hub id is tried before the teacher's hours, as far as it is on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from distill.experiment.file import load_experiment
from distill.forecast.ahead import check_student_ahead
from distill.forecast.machine.cards import this_machine
from distill.models import checkpoints
from distill.models.checkpoints import Checkpoint

Keep = Callable[..., Path]
PARTS = {"config": ("config.json",), "tokenizer": ("tokenizer*", "chat_template*"), "weights": ("*.safetensors",)}


@pytest.fixture
def keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keep:
    """`keep("a/student", folder, "config")`: parts of a model's folder, all by default, as a hub's on this machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(name: str, folder: Path, *parts: str) -> Path:
        kept = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = kept / "snapshots/1234"
        for place in (kept / "refs", snapshot):
            place.mkdir(parents=True, exist_ok=True)
        (kept / "refs/main").write_text("1234")
        for pattern in (pattern for part in parts or PARTS for pattern in PARTS[part]):
            for file in folder.glob(pattern):
                shutil.copy(file, snapshot)
        return snapshot

    return put


def student(name: str, class_path: str = "huggingface") -> dict[str, Any]:
    return {"class_path": class_path, "options": {"model": name}}


def test_it_is_tried(world: Any, distill: Any, tmp_path: Path, keep: Keep) -> None:
    snapshot = keep("a/student", world.folder / "teacher")
    weights = load_file(snapshot / "model.safetensors")
    save_file({**weights, "lm_head.weight": weights["lm_head.weight"] * float("nan")}, snapshot / "model.safetensors")
    file = world.write(tmp_path / "experiment.yaml", student=student("a/student"))
    distill("run", file).refused("student huggingface: its outputs are not finite")
    assert not (tmp_path / "run/cache").exists()


@pytest.mark.parametrize("class_path", ["huggingface", "lora"])
def test_its_damaged_weights_are_found(world: Any, distill: Any, tmp_path: Path, keep: Keep, class_path: str) -> None:
    snapshot = keep("a/student", world.folder / "teacher")
    (snapshot / "model.safetensors").write_bytes(b"")
    file = world.write(tmp_path / "experiment.yaml", student=student("a/student", class_path))
    distill("run", file).refused("a/student: model.safetensors is empty")
    assert not (tmp_path / "run/cache").exists()


def test_its_other_tokenizer_is_found_without_its_weights(world: Any, distill: Any, tmp_path: Path, keep: Keep) -> None:
    keep("a/student", world.save_teacher(tmp_path / "other", "llama", vocabulary=600), "config", "tokenizer")
    file = world.write(tmp_path / "experiment.yaml", student=student("a/student"))
    distill("run", file).refused("a/student has another tokenizer than the teacher")


@pytest.mark.parametrize("is_sharded", [False, True])
def test_what_is_not_here_is_said(world: Any, distill: Any, tmp_path: Path, keep: Keep, is_sharded: bool) -> None:
    """A half of the weights is none."""
    snapshot = keep("a/student", world.folder / "teacher", "config", "tokenizer")
    if is_sharded:
        shutil.copy(world.folder / "teacher/model.safetensors", snapshot / "1.safetensors")
        index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
        (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    file = world.write(tmp_path / "experiment.yaml", student=student("a/student"), cache={"max_samples": 4})
    said = distill("cache-teacher", file).done().out
    line = "student huggingface: it is tried only when its training begins: a/student is not on this machine yet"
    assert said.count(line) == 1 and said.index(line) < said.index("\nteacher: ")
    if not is_sharded:
        assert distill("plan", file).out.count(f"- {line}") == 1


def test_a_plan_says_that_it_loads_no_weights(world: Any, tmp_path: Path) -> None:
    file = world.write(tmp_path / "experiment.yaml", student=student(world.content["teacher"]["model"]))
    said = check_student_ahead(load_experiment(file, []), this_machine("cpu"), with_weights=False)
    assert said is not None and said.startswith("student huggingface: a plan does not load its weights")


def test_the_tokens_of_a_teacher_that_comes_now_are_compared(
    world: Any, distill: Any, tmp_path: Path, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher's tokenizer is fetched with its weights, so until then there is nothing to compare with."""

    def fetch(name: str, *_: Any) -> Checkpoint:
        return Checkpoint(keep(name, world.folder / "teacher"), None, name)

    monkeypatch.setattr(checkpoints, "download", fetch)
    keep("a/teacher", world.folder / "teacher", "config")
    other = world.save_teacher(tmp_path / "other", "llama", vocabulary=600)
    file = world.write(tmp_path / "experiment.yaml", student=student(str(other)), teacher={"model": "a/teacher"})
    distill("run", file).refused("other has another tokenizer than the teacher")
    assert not (tmp_path / "run/cache").exists()
