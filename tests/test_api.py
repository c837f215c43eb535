"""The public names: lazy, the same for a type checker, and commands that give signals and values back."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import distill
from distill import UserError, cache_teacher, load_experiment, train_student

ROOT = Path(__file__).resolve().parents[1]


def test_importing_the_package_and_reading_an_experiment_imports_nothing_heavy() -> None:
    code = (
        "import sys, distill; "
        "from distill import load_experiment, Experiment, UserError, cache_teacher; "
        "load_experiment('configs/demo.yaml'); print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_type_checker_sees_the_names_that_there_are() -> None:
    tree = ast.parse((ROOT / "distill" / "__init__.py").read_text(encoding="utf-8"))
    (checking,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in checking.body if isinstance(node, ast.ImportFrom) and node.module != "typing"]
    assert {alias.name: node.module for node in imports for alias in node.names} == distill._PLACES
    assert all(getattr(distill, name) is not None for name in distill.__all__)
    assert set(distill.__all__) <= set(dir(distill))
    with pytest.raises(AttributeError, match="no attribute 'cache_techer'"):
        _ = distill.cache_techer  # type: ignore[attr-defined]


def test_an_experiment_is_a_mapping_as_well(tmp_path: Path) -> None:
    import numpy as np

    content = {"corpus": {"path": tmp_path / "text.txt"}, "teacher": {"model": "teacher"}}
    found = load_experiment(content, {"train.seed": np.int64(3), "student.options": {"layers": 2}, "run_dir": "r"})
    assert (found.corpus.path, found.train.seed, found.student.options) == (
        str(tmp_path / "text.txt"),
        3,
        {"layers": 2},
    )
    assert "train" not in content, "what is given stays as it is"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.sed": 1}, "did you mean 'seed'"),
        ({"train": 3}, "must be a mapping"),
        ({"run_dir.name": 3}, "'run_dir' is a value without keys"),
        ({"train.seed": object()}, "is no plain value"),
        ({"train.learning_rate": 100}, "is not between"),
    ],
)
def test_a_mistake_is_one_line(changes: dict[str, Any], words: str) -> None:
    content = {"corpus": {"path": "text.txt"}, "teacher": {"model": "teacher"}, "run_dir": "runs/a"}
    with pytest.raises(UserError, match=words) as raised:
        load_experiment(content, changes)
    assert "\n" not in str(raised.value)


def test_several_processes_are_refused(world: Any, tmp_path: Path) -> None:
    file = world.write(tmp_path / "my.yaml")
    with pytest.raises(UserError, match=r"train\.devices: 2: from Python one process"):
        train_student(load_experiment(file, {"train.devices": 2}))


def test_a_stop_keeps_what_is_done_and_gives_the_signals_back(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_traces: None
) -> None:
    from distill.cache.making.predict import TeacherModule

    experiment = load_experiment(world.write(tmp_path / "my.yaml"))
    step, handler, hook = TeacherModule.predict_step, signal.getsignal(signal.SIGINT), sys.unraisablehook

    def interrupted(self: Any, *arguments: Any, **keywords: Any) -> Any:
        monkeypatch.undo()  # once
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(TeacherModule, "predict_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="everything so far is kept"):
        cache_teacher(experiment)
    assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == (handler, hook)
    assert (cache_teacher(experiment) / "manifest.json").is_file()
    assert len(distill.CacheReader(tmp_path / "run" / "cache", "train")) > 0
    with pytest.raises(UserError, match="no split 'test'"):
        distill.CacheReader(tmp_path / "run" / "cache", "test")


def test_a_cache_of_hidden_states_brings_its_head(world: Any, tmp_path: Path, no_traces: None) -> None:
    import torch

    file = world.write(tmp_path / "my.yaml", cache={"scheme": "hidden", "max_samples": 2, "held_out_samples": 2})
    reader = distill.CacheReader(cache_teacher(load_experiment(file)), "train")
    batch = reader.collate([reader[0], reader[1]])
    with pytest.raises(UserError, match=r"reader\.teacher_head"):
        distill.chunk_target(batch)
    target = distill.chunk_target(batch, teacher_head=reader.teacher_head)
    head = reader.teacher_head
    hidden_ND = torch.zeros(int(batch.loss_mask_BL.sum()), head.weight_VD.shape[1])
    loss = distill.fused_loss(hidden_ND, head, target, distill.divergences.reverse_kl, chunk_size=16)
    assert loss.item() > 0
