"""A run's folder is read whole, as far as it goes, and refused in one line where it is damaged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.errors import UserError
from distill.report.curves import read_curves, thin
from distill.report.facts import RunFacts


def test_everything_is_read(fake_run: Callable[..., Path]) -> None:
    run = fake_run()
    facts = RunFacts.read(run)
    content = json.loads((run / "evaluation.json").read_text())
    assert facts.section("parameters") == content["parameters"]
    assert facts.of("fidelity", "student")["intervals"] == content["fidelity"]["student"]["intervals"]
    assert facts.section("experiment") == content["experiment"]  # nulls and all
    assert facts.name == "demo"
    assert [line["phase"] for line in facts.costs].count("train-student") == 2
    assert len(facts.forecast) == 3 and "measured" not in facts.forecast[2]
    assert facts.ratio("parameters") == pytest.approx(56_632_896 / 134_515_008)
    assert facts.ratio("cost", "decode", "1") == pytest.approx(2.13)
    assert facts.ratio("cost", "decode", "99") is None
    assert "to" not in facts.of("fidelity", "student")["by_entropy"][-1]


def test_the_starts_of_a_training_make_one_curve(fake_run: Callable[..., Path]) -> None:
    curves = RunFacts.read(fake_run()).curves["student"]
    steps = [step for step, _ in curves["loss"]]
    assert steps == list(range(3, 301, 4))  # none twice, though two starts logged 143 and 147
    assert [step for step, _ in curves["held_out_kl"]] == list(range(20, 301, 20))


def test_a_training_begun_anew_replaces_the_curve(tmp_path: Path) -> None:
    (tmp_path / "metrics.1.csv").write_text("held_out_kl,loss,step\n,9.0,3\n,8.0,7\n")
    (tmp_path / "metrics.10.csv").write_text("held_out_kl,loss,step\n,5.0,3\n")
    (tmp_path / "metrics.2.csv").write_text("held_out_kl,loss,step\n,7.0,11\n")
    (tmp_path / "metrics.csv").write_text("held_out_kl,loss,step\n,4.0,7\n,na")
    assert read_curves(tmp_path) == {"loss": [(3.0, 5.0), (7.0, 4.0)]}


def test_values_that_are_not_finite_are_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("loss,step\n2.0,1\nnan,2\n1.0,3\n")
    (_, first), (_, second), (_, third) = read_curves(tmp_path)["loss"]
    assert (first, third) == (2.0, 1.0) and math.isnan(second)


def test_a_damaged_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("loss,step\nwhat,1\n1.0,3\n")
    with pytest.raises(UserError, match="line 2"):
        read_curves(tmp_path)


def test_many_points_become_means() -> None:
    points = [(float(step), float(step % 2)) for step in range(1000)]
    thinned, width = thin(points, 100)
    assert width == 10 and len(thinned) == 100
    assert all(value == 0.5 for _, value in thinned)
    assert thin(points[:50], 100) == (points[:50], 1)


def test_what_is_absent_is_absent(fake_run: Callable[..., Path]) -> None:
    run = fake_run(
        change=lambda content: [content.pop(key) for key in list(content) if key != "parameters"], logs=False
    )
    (run / "costs.jsonl").unlink()
    (run / "forecast.json").unlink()
    facts = RunFacts.read(run)
    assert set(facts.evaluation) == {"parameters"}
    assert (facts.curves, facts.costs, facts.forecast) == ({}, (), ())


def test_a_torn_line_of_costs_does_not_count(fake_run: Callable[..., Path]) -> None:
    run = fake_run()
    with open(run / "costs.jsonl", "a") as file:
        file.write('{"phase": "evalu\n{"phase": "evaluate", "seconds": 1.0}\n{"pha')
    assert [line["seconds"] for line in RunFacts.read(run).costs][-1] == 1.0


def set_at(content: dict[str, Any], path: str, value: Any) -> None:
    *above, last = path.split(".")
    for key in above:
        content = content[int(key)] if isinstance(content, list) else content[key]
    content[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("parameters", [1]),
        ("parameters.student", "many"),
        ("fidelity.student.kl", True),
        ("fidelity.student.intervals.kl", [1.0]),
        ("fidelity.student.by_entropy", {"from": 0}),
        ("fidelity.student.by_entropy.1.positions", None),
        ("student_against_control.kl", {"p": 0.1}),
        ("benchmarks.student.piqa.metrics.acc.value", "good"),
        ("benchmarks.student.piqa.metric", None),
        ("cost.student.decode", 3.0),
        ("texts.prompts", "one"),
        ("texts.student", [1]),
        ("seeds.student.kl.values", 3),
        ("experiment", "a file"),
    ],
)
def test_another_form_is_refused_in_one_line(fake_run: Callable[..., Path], path: str, value: Any) -> None:
    run = fake_run(change=lambda content: set_at(content, path, value))
    with pytest.raises(UserError) as refused:
        RunFacts.read(run)
    message = str(refused.value)
    assert "\n" not in message and message.startswith(str(run / "evaluation.json")) and len(message) < 400
    assert path.split(".")[-1] in message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"fidelity": ' * 3, b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_object_is_refused(fake_run: Callable[..., Path], content: bytes) -> None:
    run = fake_run()
    (run / "evaluation.json").write_bytes(content)
    with pytest.raises(UserError, match=r"evaluation\.json"):
        RunFacts.read(run)


def test_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        RunFacts.read(tmp_path / "none")
    with pytest.raises(UserError, match="distill evaluate"):
        RunFacts.read(tmp_path)
