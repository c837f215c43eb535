"""`distill plan`: its verdict is its exit status, its advice makes it fit, and an 8B model needs little to plan."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.errors import UserError
from distill.experiment.configuration import Experiment
from distill.experiment.file import load_experiment
from distill.forecast.advice import apply
from distill.forecast.forecast import Forecaster
from distill.forecast.machine.cards import find_card
from distill.recipes import plan

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def experiment(world: Any, tmp_path: Path) -> Experiment:
    return load_experiment(
        world.write(
            tmp_path / "experiment.yaml",
            corpus={"sequence_length": 256},
            student={"class_path": "compact", "options": {"hidden_size": 64, "heads": 4}},
            train={"batch_size": 8},
            evaluate={"batch_size": 1},
            cache={"batch_size": 1, "chunk_size": 16},
            loss={"chunk_size": 64},
        ),
        [],
    )


@pytest.fixture
def small_card(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> str:
    """A card on which the experiment's step fits in two passes alone."""
    card = find_card("12GiB")
    halved = apply(experiment, {"train.batch_size": 2, "train.accumulate_grad_batches": 4})
    needed = Forecaster(card).needed_bytes(halved, "train-student")
    monkeypatch.setattr(plan, "find_card", lambda name: replace(card, name=name, memory_bytes=needed))
    return "small"


def test_what_fits_is_status_0_and_a_table(experiment: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(experiment, "rtx-3060") == 0
    out = capsys.readouterr().out
    assert out.startswith("RTX 3060, 12.9 GB")
    assert all(word in out for word in ("cache-teacher", "train-student", "evaluate", "to spare", "disk: cache"))
    assert "\ntraining: 10 samples of 256 tokens, 1 epoch: 1 optimiser step of 8 samples in 1 pass, 2,048 tokens" in out
    assert "- few steps: 1 optimiser step, where 200 and more are usual: --train.epochs 4 makes 5" in out
    assert out.endswith("it fits\n")


def test_json_says_everything(experiment: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(experiment, "8GiB", as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["changes"] == [] and found["card"]["memory_bytes"] == 8 * 2**30
    assert found["training"]["steps"] == 1 and len(found["training"]["shortcomings"]) == 2
    phase = found["phases"]["train-student"]
    assert sum(phase["parts"].values()) == phase["peak_bytes"] < phase["needed_bytes"]
    assert phase["spare_bytes"] == found["limit_bytes"] - phase["needed_bytes"]
    assert set(found["disk"]) == {"cache", "corpus", "checkpoints", "student"}
    assert any("tokens read" in note and "tables" in note for note in found["notes"])


def test_the_advice_is_followed_and_it_fits(
    experiment: Experiment, small_card: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "fitting.yaml")
    assert plan.main(experiment, small_card, fit=file) == plan.DOES_NOT_FIT == 3
    out = capsys.readouterr().out
    assert "does not fit by" in out and "--train.batch_size 2 --train.accumulate_grad_batches 4" in out
    changed = load_experiment(file, [])
    assert (changed.train.batch_size, changed.train.accumulate_grad_batches) == (2, 4)
    assert changed == apply(experiment, {"train.batch_size": 2, "train.accumulate_grad_batches": 4})
    assert plan.main(changed, small_card) == 0


def test_what_cannot_be_made_to_fit_is_not_written(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = replace(find_card("12GiB"), memory_bytes=2**20, is_cuda=False)
    monkeypatch.setattr(plan, "find_card", lambda name: tiny)
    short = apply(experiment, {"corpus.sequence_length": 32, "train.batch_size": 1, "loss.chunk_size": 32})
    assert plan.main(short, "tiny", fit=str(tmp_path / "never.yaml")) == 3
    assert "it does not fit, even with smaller passes" in capsys.readouterr().out
    assert not (tmp_path / "never.yaml").exists()


def test_no_file_is_written_over(experiment: Experiment, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("mine")
    with pytest.raises(UserError, match="there already"):
        plan.main(experiment, "12GiB", fit=str(file))
    assert file.read_text() == "mine"


def test_a_full_disk_leaves_no_half_of_a_file(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: str, mode: str, encoding: str) -> Any:
        Path(path).write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(plan, "open", full, raising=False)
    with pytest.raises(UserError, match=r"cannot be written \(No space left"):
        plan.main(experiment, "12GiB", fit=str(tmp_path / "mine.yaml"))
    assert not (tmp_path / "mine.yaml").exists()


def test_an_unknown_card_is_refused(experiment: Experiment) -> None:
    with pytest.raises(UserError, match="rtx-3061"):
        plan.main(experiment, "rtx-3061")


def test_an_8b_teacher_is_planned_in_little_memory() -> None:
    """On a laptop: under 2 GB. The time is printed, for machines differ."""
    script = (
        "import json, resource, time, torch; torch.set_num_threads(1); begun = time.monotonic()\n"
        "from distill.experiment.file import load_experiment; from distill.recipes import plan\n"
        "status = plan.main(load_experiment('configs/llama-8b-to-1b-12gb.yaml', []), 'rtx-3060')\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(json.dumps([status, peak * 1024, time.monotonic() - begun]))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    status, peak, seconds = json.loads(done.stdout.splitlines()[-1])
    print(f"{peak / 1e9:.2f} GB, {seconds:.0f} s")
    assert status == 0
    assert peak < 2e9


def test_a_memory_limit_is_all_there_is(experiment: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(replace(experiment, memory_limit="2GiB"), "12GiB", as_json=True)
    assert json.loads(capsys.readouterr().out)["limit_bytes"] == 2 * 2**30


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.rounding": "stochastic"}, "train.rounding"),
        ({"train.optimizer": "paged_adamw_8bit", "train.rounding": "kahan", "train.precision": "bf16-true"}, "paged"),
        ({"train.step_in_backward": True}, "train.step_in_backward"),
        ({"loss.divergence": "reverse_kl"}, "reverse_kl"),
        ({"corpus.sequence_length": 100_000}, "corpus.sequence_length"),
        ({"corpus.path": "/nowhere/text.jsonl"}, "no such file or folder"),
    ],
)
def test_what_a_phase_would_refuse_is_refused(experiment: Experiment, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan.main(apply(experiment, changes), "12GiB")


STUDENT = """
import torch
from distill.models.language_model import Head

class Mine(torch.nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, 8)
        self.head = Head(self.embedding.weight)
    def body(self, input_ids, position_ids):
        if type(input_ids) is not torch.Tensor:  # one without memory
            raise RuntimeError("not today")
        return self.embedding(input_ids)
"""


def test_what_can_be_forecast_is_where_something_else_cannot(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(STUDENT)
    student = {"student.class_path": f"{tmp_path}/mine.py:Mine", "student.options": {}}
    with pytest.raises(UserError, match=r"train-student: no forecast \(RuntimeError: not today\)"):
        plan.main(apply(experiment, student), "12GiB")
    out = capsys.readouterr().out
    assert "cache-teacher" in out and "it fits, as far as there is a forecast" in out


def test_a_terminal_sees_what_is_simulated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with plan._shown() as show:
        show("cache-teacher")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with plan._shown() as show:
        show("cache-teacher")
        show("evaluate")
    shown = capsys.readouterr().err
    assert "plan: evaluate, simulation 2" in shown and shown.endswith("\r\x1b[K"), "the line goes"
