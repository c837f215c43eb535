"""The parts of an evaluation: several seeds, speed and texts, and an evaluation that was stopped half-way."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from distill.experiment import checks, subjects, teacher
from distill.recipes.evaluate import measurements
from distill.report.steadiness import unsteady
from distill.system.interrupt import Interrupted

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(finished: Any, tmp_path: Path) -> list[str]:
    """Arguments for a copy of the finished run without its evaluation."""
    shutil.copytree(
        finished.run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation.json", "measured.jsonl", "cache")
    )
    return finished.elsewhere(tmp_path / "run")


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def test_several_seeds_give_mean_and_deviation(run: list[str], finished: Any, distill: Any, tmp_path: Path) -> None:
    """Each seed is a training of its own, the control's too; the first is the one that was there."""
    seeds = ["--evaluate.seeds", 2]
    before = (tmp_path / "run/student/model.safetensors").stat().st_mtime_ns
    distill("evaluate", *run, *seeds).refused("seeds/1/student", "distill train-student")
    distill("train-student", *run, *seeds).done()
    assert (tmp_path / "run/student/model.safetensors").stat().st_mtime_ns == before
    outcome = distill("evaluate", *run, *seeds).done()
    result = read(tmp_path / "run")
    assert set(result["seeds"]) == {"student", "control"}
    for kind in ("student", "control"):
        values = [result["fidelity"][name]["kl"] for name in (kind, f"seeds/1/{kind}")]
        found = result["seeds"][kind]["kl"]
        assert len(set(values)) == 2 and found["values"] == values
        assert found["mean"] == pytest.approx(statistics.mean(values))
        assert found["deviation"] == pytest.approx(statistics.stdev(values))
    assert "over 2 seeds" in outcome.out
    assert f"{result['seeds']['student']['kl']['mean']:.3f}" in (tmp_path / "run/report.html").read_text()
    alone = read(finished.run)["fidelity"]
    assert {name: result["fidelity"][name] for name in alone} == alone
    same = distill("train-student", finished.file, "--run_dir", tmp_path / "other", "--cache.dir", finished.cache,
                   "--train.seed", 1, "--evaluate.control", "false")  # fmt: skip
    same.done()
    ours, theirs = (tmp_path / "run/seeds/1/student", tmp_path / "other/student")
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()


def test_speed_and_texts_of_each_model(
    run: list[str], distill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each model is loaded in several rounds, and tried for its contract in the first."""
    tried: list[str] = []

    def counted(model: Any, name: str, *args: Any, **options: Any) -> bool:
        tried.append(name)
        return checks.check_model(model, name, *args, **options)

    monkeypatch.setattr(subjects, "check_model", counted)
    monkeypatch.setattr(teacher, "check_model", counted)
    more = ["--evaluate.cost", "true", "--evaluate.cost_batch_sizes", "[1, 2]", "--evaluate.texts", 2,
            "--evaluate.text_tokens", 5]  # fmt: skip
    outcome = distill("evaluate", *run, *more).done()
    assert sorted(name.split()[0] for name in tried) == ["student"] * 3 + ["teacher"]  # before, student, control
    result = read(tmp_path / "run")
    for name in ("teacher", "student", "control"):
        found = result["cost"][name]
        assert set(found["prefill"]) == set(found["decode"]) == {"1", "2"}
        assert all(rate > 0 for phase in ("prefill", "decode") for rate in found[phase].values())
        assert found["peak_bytes"] > found["weight_bytes"] > 0 and found["bytes_on_disk"] > 0
        assert len(result["texts"][name]) == len(result["texts"]["prompts"]) == len(result["texts"]["truth"]) > 0
    assert result["cost"]["student"]["weight_bytes"] < result["cost"]["teacher"]["weight_bytes"]
    # A speed that differs from round to round gives no speed-up.
    assert ("speculative" in result) == (not unsteady(result["cost"]))
    assert result.get("speculative", {"speedup": 1.0})["speedup"] > 0
    assert "decode x2" in outcome.out
    page = (tmp_path / "run/report.html").read_text()
    assert f"{result['fidelity']['student']['kl']:.3f}" in page and (tmp_path / "run/report.md").exists()
    assert "nothing to do" in distill("evaluate", *run, *more).done().out


def test_what_a_stopped_evaluation_measured_is_kept(
    run: list[str], distill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at the student's texts, it goes on there: those of the teacher are not written twice."""
    written: list[str] = []
    measure = measurements.Texts.measure

    def stop_at_student(self: Any, subject: Any, loaded: Any) -> Any:
        written.append(subject.name)
        if written == ["teacher", "student"]:
            raise Interrupted("SIGINT")
        return measure(self, subject, loaded)

    monkeypatch.setattr(measurements.Texts, "measure", stop_at_student)
    texts = ["--evaluate.texts", 1, "--evaluate.text_tokens", 3]
    stopped = distill("evaluate", *run, *texts)
    assert stopped.status == 130 and "To go on: distill evaluate" in stopped.err
    assert not (tmp_path / "run/evaluation.json").exists()
    distill("evaluate", *run, *texts).done()
    assert written == ["teacher", "student", "student", "control"]
    assert set(read(tmp_path / "run")["texts"]) == {"prompts", "truth", "teacher", "student", "control"}
    costs = [json.loads(line) for line in (tmp_path / "run/costs.jsonl").read_text().splitlines()]
    assert [line["ended"] for line in costs if line["phase"] == "evaluate"][-2:] == ["interrupted", "done"]
