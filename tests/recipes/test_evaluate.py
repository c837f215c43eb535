"""`distill evaluate`: measured once for the same inputs, and refused where there is nothing sound to measure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def run(finished: Any, tmp_path: Path) -> Any:
    """A copy of the finished run without its evaluation: `run(file's overrides)` as a list of arguments."""
    shutil.copytree(finished.run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation.json", "cache"))
    return [*finished.elsewhere(tmp_path / "run")]


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def measured(folder: Path) -> dict[str, Any]:
    """What an evaluation found, without the file that it was asked by."""
    return {key: value for key, value in read(folder).items() if key != "experiment"}


def test_it_needs_no_cache_and_repeats_to_the_last_bit(run: Any, finished: Any, distill: Any, tmp_path: Path) -> None:
    distill("evaluate", *run, "--cache.dir", tmp_path / "none").done()
    assert measured(tmp_path / "run") == measured(finished.run)


def test_neither_batch_nor_chunk_changes_what_is_measured(
    run: Any, finished: Any, distill: Any, tmp_path: Path
) -> None:
    distill("evaluate", *run, "--evaluate.batch_size", 3, "--loss.chunk_size", 7).done()
    ours, theirs = read(tmp_path / "run"), read(finished.run)
    assert ours["text"] == theirs["text"]
    for role in ("before", "student", "control"):
        mine, other = (
            {name: value for name, value in result["fidelity"][role].items() if isinstance(value, float)}
            for result in (ours, theirs)
        )
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_other_inputs_are_measured_anew(run: Any, distill: Any, tmp_path: Path) -> None:
    distill("evaluate", *run, "--evaluate.max_samples", 4, "--evaluate.control", "false").done()
    fewer = read(tmp_path / "run")
    assert 0 < fewer["text"]["tokens"] < 4 * 48 and "control" not in fewer["fidelity"]
    again = distill("evaluate", *run, "--evaluate.max_samples", 4, "--evaluate.control", "false")
    assert "nothing to do" in again.done().out and "│ student" in again.out
    more = distill("evaluate", *run, "--evaluate.max_samples", 8, "--evaluate.control", "false")
    assert "nothing to do" not in more.done().out
    assert read(tmp_path / "run")["text"]["tokens"] > fewer["text"]["tokens"]


@pytest.mark.parametrize(
    "content", ['{"made_from": {', "[]", "{}", "3", '{"made_from": {"fidelity::student": ["a", "b"]}}']
)
def test_a_damaged_evaluation_is_measured_anew(
    run: Any, finished: Any, distill: Any, tmp_path: Path, content: str
) -> None:
    (tmp_path / "run/evaluation.json").write_text(content)
    fewer = ["--evaluate.max_samples", 1, "--evaluate.control", "false"]
    assert (
        "evaluation.json is damaged, or of an earlier version: measuring anew"
        in distill("evaluate", *run, *fewer).done().out
    )
    assert read(tmp_path / "run")["text"]["tokens"] > 0


def test_what_the_beginning_depends_on_is_an_input(run: Any, distill: Any) -> None:
    """Students look at the first samples of the cache while they are made."""
    fewer = ["--evaluate.max_samples", 1, "--evaluate.control", "false"]
    distill("evaluate", *run, *fewer).done()
    assert "nothing to do" in distill("evaluate", *run, *fewer).done().out
    assert "nothing to do" not in distill("evaluate", *run, *fewer, "--cache.max_samples", 3).done().out


def test_before_training_there_is_nothing_to_evaluate(finished: Any, distill: Any, tmp_path: Path) -> None:
    outcome = distill("evaluate", *finished.elsewhere(tmp_path / "run"))
    outcome.refused(str(tmp_path / "run/student"), "no trained student", "distill train-student")


def test_without_held_out_text_there_is_nothing_to_evaluate(run: Any, distill: Any) -> None:
    distill("evaluate", *run, "--corpus.held_out", 0).refused("nothing to evaluate on", "corpus.held_out")


def test_a_student_of_another_make_is_refused(run: Any, distill: Any) -> None:
    """`before` is made from the experiment: with another student it would not be the trained one's beginning."""
    outcome = distill("evaluate", *run, "--student.options", "{layers: 3}")
    outcome.refused("holds another student", "student.options.layers: 2 there, 3 here")
    distill("evaluate", *run, "--train.seed", 5).refused("holds another student", "train.seed: 0 there, 5 here")


def test_a_teacher_of_another_vocabulary_is_refused(run: Any, make_teacher: Any, distill: Any) -> None:
    larger = make_teacher("llama", vocabulary=500)
    distill("evaluate", *run, "--teacher.model", larger).refused("413 rows", "not the same vocabulary")


def test_a_damaged_student_folder_is_refused(run: Any, distill: Any, tmp_path: Path) -> None:
    (tmp_path / "run/student/model.safetensors").unlink()
    distill("evaluate", *run).refused("run/student", "model.safetensors")
    (tmp_path / "run/student/settings.json").unlink()
    distill("evaluate", *run).refused("run/student", "settings.json")
