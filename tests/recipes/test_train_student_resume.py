"""Stopped and continued, a training ends with the very weights of one that was left alone."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.progress import Progress


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student/model.safetensors")


def assert_same_weights(run: Path, other: Path) -> None:
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# Long enough for a signal to find it at work, with a line of output every few steps.
LONG = ["--train.epochs", "4", "--train.validate_every_steps", "5", "--evaluate.control", "false"]


@pytest.fixture(scope="session")
def undisturbed(finished: Any, distill: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    distill("train-student", *finished.elsewhere(run), *LONG).done()
    return run


@pytest.mark.parametrize(("name", "command"), [("SIGINT", "train-student"), ("SIGTERM", "run")])
def test_a_signal_stops_a_real_process_which_says_how_to_go_on(
    finished: Any, undisturbed: Path, distill: Any, stop: Any, untouched: Any, tmp_path: Path, name: str, command: str
) -> None:
    run = tmp_path / "run"
    arguments = [*finished.elsewhere(run), *LONG]
    stopped = stop(signal.Signals[name], lambda out: "step 5: held-out KL" in out, command, *arguments)
    assert stopped.status == 130, stopped
    assert "Traceback" not in stopped.err and not (run / "student").exists()
    suggested = stopped.err.partition("everything so far is kept. To go on: distill ")[2].split()
    assert suggested == [command, *arguments, *(["--resume"] if command == "train-student" else [])]
    assert torch.load(run / "checkpoints/student/last.ckpt", weights_only=True)["global_step"] >= 5
    if command == "train-student":
        before = untouched(run)
        distill(command, *arguments).refused("last.ckpt", "unfinished training", "--resume")
        assert untouched(run) == before
    assert "student: continuing from" in distill(*suggested).done().out
    assert_same_weights(run, undisturbed)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, batch: int, times: int = 1) -> None:
    """Send Ctrl-C to this process when a training has made so many forward passes."""
    advance = Progress.advance
    passes = 0

    def advanced(self: Progress, amount: int, **values: object) -> None:
        nonlocal passes
        advance(self, amount, **values)
        passes += self.title.startswith("train")
        if passes == batch:
            passes += 1
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Progress, "advance", advanced)


TWO_EPOCHS = ["--train.epochs", "2", "--train.accumulate_grad_batches", "3", "--train.validate_every_steps", "4"]


@pytest.fixture(scope="session")
def two_epochs(finished: Any, distill: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 micro-batches an epoch make nine steps, the last of which has one."""
    run = tmp_path_factory.mktemp("two_epochs") / "run"
    own = [*finished.elsewhere(run), "--evaluate.control", "false"]
    distill("train-student", *own, *TWO_EPOCHS).done()
    return run


@pytest.mark.parametrize(("batch", "step"), [(4, 2), (12, 4), (25, 9), (29, 11), (50, 18)])
def test_wherever_it_is_stopped_no_sample_is_missed_or_seen_twice(
    train: Any, two_epochs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, batch: int, step: int
) -> None:
    """In an accumulation, at a measurement, at an epoch's end, in the second epoch, at the last step."""
    interrupt_at(monkeypatch, batch)
    assert train(*TWO_EPOCHS).status == 130
    saved = torch.load(tmp_path / "run/checkpoints/student/last.ckpt", weights_only=True)
    assert saved["global_step"] == step
    train(*TWO_EPOCHS, "--resume").done()
    assert_same_weights(tmp_path / "run", two_epochs)


def test_a_second_ctrl_c_stops_at_once_and_costs_the_steps_since_the_last_checkpoint(
    train: Any, two_epochs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interrupt_at(monkeypatch, 20, times=2)
    assert train(*TWO_EPOCHS).status == 130
    saved = torch.load(tmp_path / "run/checkpoints/student/last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    train(*TWO_EPOCHS, "--resume").done()
    assert_same_weights(tmp_path / "run", two_epochs)


def test_continuing_keeps_the_log_of_before(train: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    often = [*TWO_EPOCHS, "--train.log_every_steps", "1"]
    interrupt_at(monkeypatch, 15)
    assert train(*often).status == 130
    train(*often, "--resume").done()
    steps = []
    for name in ("metrics.1.csv", "metrics.csv"):
        with open(tmp_path / "run/logs/student" / name, encoding="utf-8") as file:
            steps += [int(row["step"]) for row in csv.DictReader(file) if row["loss"]]
    # Lightning writes a line when the batch is over: the step at whose end it was stopped has none.
    assert steps == [step for step in range(18) if step != 4]


def test_interrupted_before_anything_is_saved_it_begins_again(
    train: Any, two_epochs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interrupt_at(monkeypatch, 4, times=2)
    assert train(*TWO_EPOCHS).status == 130
    assert not list((tmp_path / "run/checkpoints/student").glob("*.ckpt"))
    train(*TWO_EPOCHS, "--resume").done()
    assert_same_weights(tmp_path / "run", two_epochs)


def test_other_settings_do_not_continue_a_training(
    train: Any, monkeypatch: pytest.MonkeyPatch, untouched: Any, tmp_path: Path
) -> None:
    interrupt_at(monkeypatch, 6)
    assert train(*TWO_EPOCHS).status == 130
    before = untouched(tmp_path / "run")
    for changed, words in (
        (["--train.learning_rate", "0.001"], "train.learning_rate: 0.005 there, 0.001 here"),
        (["--student.options", "{layers: 3}"], "student.options.layers: 2 there, 3 here"),
        (["--loss.alpha", "0.5"], "alpha: 0.0 there, 0.5 here"),
    ):
        train(*TWO_EPOCHS, *changed, "--resume").refused("other settings", words, "--run_dir")
    assert untouched(tmp_path / "run") == before


def test_the_student_is_kept_when_the_control_is_interrupted(
    finished: Any, distill: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = ["train-student", *finished.elsewhere(tmp_path / "run"), "--train.max_steps", "6"]
    advance = Progress.advance

    def advanced(self: Progress, amount: int, **values: object) -> None:
        advance(self, amount, **values)
        if self.title == "train control" and self.done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Progress, "advance", advanced)
    assert distill(*arguments).status == 130
    monkeypatch.undo()
    continued = distill(*arguments, "--resume").done()
    assert "run/student is trained; nothing to do" in continued.out and "control: continuing from" in continued.out
