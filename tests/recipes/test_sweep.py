"""`distill sweep`: runs that share one cache and one measurement of the teacher, stopped and resumed, in one table."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from distill.errors import UserError
from distill.recipes import sweep
from distill.recipes.sweep import prepared
from distill.system import interrupt

pytestmark = pytest.mark.usefixtures("one_thread")

VARY = ("--vary", "loss.alpha=0,0.5", "--vary", "train.seed=0,1")
SMALL = ("--cache.max_samples", 8, "--train.max_steps", 2, "--evaluate.max_samples", 4)
TEXTS = ("--evaluate.texts", 1, "--evaluate.text_tokens", 4)


@pytest.fixture
def file(world: Any, tmp_path: Path) -> str:
    return str(world.write(tmp_path / "my.yaml"))


def test_a_stopped_sweep_goes_on_and_is_the_undisturbed_one(
    file: str, distill: Any, contents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped between the second run's training and its evaluation."""
    from distill.recipes import evaluate

    calls: list[int] = []
    measure = evaluate.main

    def stopping(*arguments: Any) -> int:
        calls.append(1)
        if len(calls) == 2:
            raise interrupt.Interrupted(signal.Signals.SIGTERM.name)
        return measure(*arguments)

    monkeypatch.setattr(evaluate, "main", stopping)
    stopped = distill("sweep", file, *SMALL, *TEXTS, *VARY)
    assert stopped.status == 130 and "To go on: distill sweep" in stopped.err and "--vary" in stopped.err
    run = tmp_path / "run"
    trained = contents(run / "loss.alpha=0,train.seed=1" / "student")
    done = distill("sweep", file, *SMALL, *TEXTS, *VARY).done()
    assert contents(run / "loss.alpha=0,train.seed=1" / "student") == trained
    assert "sweep: run 4 of 4: loss.alpha=0.5,train.seed=1" in done.out
    assert [path.name for path in run.rglob("manifest.json")] == ["manifest.json"], "one cache"

    rows = list(csv.DictReader((run / "sweep.csv").read_text().splitlines()))
    table = json.loads((run / "sweep.json").read_text())
    assert [(row["loss.alpha"], row["train.seed"]) for row in rows] == [
        ("0", "0"),
        ("0", "1"),
        ("0.5", "0"),
        ("0.5", "1"),
    ] or {row["loss.alpha"] for row in rows} == {"0.0", "0.5"}
    first, second = table["settings"]
    kls = [float(row["kl"]) for row in rows]
    assert first["kl"] == pytest.approx((kls[0] + kls[1]) / 2) and first["seeds"] == 2
    difference = ((kls[2] - kls[0]) + (kls[3] - kls[1])) / 2
    assert second["kl.difference"] == pytest.approx(difference) and first["kl.difference"] is None
    assert (run / "compare.html").is_file()
    for row in rows:
        own = json.loads((run / row["run"] / "evaluation.json").read_text())
        assert own["fidelity"]["student"]["kl"] == float(row["kl"])
    texts = [line for path in run.rglob("measured.jsonl") for line in path.read_text().splitlines() if "texts:" in line]
    assert [":teacher:" in line for line in texts].count(True) == 1 and len(texts) > 4, "the teacher writes once"
    again = distill("sweep", file, *SMALL, *TEXTS, *VARY).done()
    assert again.out.count("nothing to do") >= 8, "nothing is made twice"


@pytest.mark.parametrize(
    ("vary", "words"),
    [
        ([], "what varies"),
        (["loss.alpha"], "give a key and its values"),
        (["loss.alpha="], "give a key and its values"),
        (["cache.threshold=0.1,0.2"], "share one cache"),
        (["loss.alpha=0,0"], "has a value twice"),
        (["loss.alpha=0,1", "loss.alpha=0.5"], "stands twice"),
        (["loss.alpah=0,1"], "did you mean 'alpha'"),
        (["loss.alpha=0,2"], "is not between 0 and 1"),
        (["loss.divergence=forward_kl,jsd"], r"loss\.divergence=jsd: .*cannot be estimated without bias"),
    ],
)
def test_a_mistake_is_found_before_the_teachers_hours(file: str, vary: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        prepared(file, [], vary)
    assert not (tmp_path / "run").exists()


def test_lists_and_mappings_are_values_and_folders_have_plain_names(file: str, tmp_path: Path) -> None:
    runs = prepared(file, [], ["student.options={layers: 1},{layers: 2}", "train.learning_rate=1e-3,2e-3"])
    assert len(runs) == 4
    assert runs[0].name == "student.options=_layers__1_,train.learning_rate=1e-3"
    assert "--student.options={layers: 1}" in runs[0].overrides
    assert sweep.SECTIONS == ("student", "loss", "train")
