"""Stopped and continued, a training ends with the very weights of one that was left alone."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.plugins import load_language_model
from distill.system.progress import Progress

COMPACT = Path(__file__).parents[2] / "students/compact.py"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student/model.safetensors")


def last(run: Path) -> Path:
    """The newest checkpoint of the student."""
    return max((run / "checkpoints/student").glob("step-*.ckpt"))


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
    assert torch.load(last(run), weights_only=True)["global_step"] >= 5
    if command == "train-student":
        before = untouched(run)
        distill(command, *arguments).refused(last(run).name, "unfinished training", "--resume")
        assert untouched(run) == before
    assert "student: continuing from" in distill(*suggested).done().out
    assert_same_weights(run, undisturbed)
    predicted = [(each / "logs/student/prediction.json").read_text() for each in (run, undisturbed)]
    assert predicted[0] == predicted[1]


def test_a_student_whose_code_changed_is_another(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused in a folder that is trained or to be resumed, and said on loading; a comment changes nothing."""
    file = tmp_path / "own.py"
    plain = COMPACT.read_text(encoding="utf-8").replace("class CompactDecoder(", "class Own(")
    file.write_text(plain)
    chosen = ["--student.class_path", f"{file}:Own", "--student.options", '{"hidden_size": 16, "heads": 2}']
    train(*chosen, "--train.max_steps", 2).done()
    folder = tmp_path / "run/student"
    described = json.loads((folder / "student.json").read_text())
    assert described["options"]["norm_eps"] == 1e-5 and described["options"]["hidden_size"] == 16

    file.write_text(f"# A comment.\n{plain}")
    load_language_model(folder, class_path=f"{file}:Own")
    assert "has changed" not in capsys.readouterr().out
    assert "nothing to do" in train(*chosen, "--train.max_steps", 2).done().out
    file.write_text(plain.replace("norm_eps: float = 1e-5", "norm_eps: float = 1e-3"))
    load_language_model(folder, class_path=f"{file}:Own")
    assert "the code of" in (said := capsys.readouterr().out) and "has changed" in said
    train(*chosen, "--train.max_steps", 2).refused("other settings", "student.source")
    settings = folder / "settings.json"
    of_before = json.loads(settings.read_text())
    for added in ("source", "defaults"):
        del of_before["student"][added]
    settings.write_text(json.dumps(of_before))
    assert "nothing to do" in train(*chosen, "--train.max_steps", 2).done().out, "a folder of an older version"
    shutil.rmtree(folder)
    train(*chosen, "--train.max_steps", 2, "--resume").refused("other settings", "student.source")


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, times: int = 1) -> None:
    """Send Ctrl-C to this process when a training has made so many steps."""
    advance = Progress.advance
    steps = 0

    def advanced(self: Progress, amount: int, **values: object) -> None:
        nonlocal steps
        advance(self, amount, **values)
        steps += self.title.startswith("train")
        if steps == step:
            steps += 1
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Progress, "advance", advanced)


TWO_EPOCHS = ["--train.epochs", "2", "--train.accumulate_grad_batches", "3", "--train.validate_every_steps", "4"]
TWO_EPOCHS += ["--train.checkpoint_every_steps", "4"]


@pytest.fixture(scope="session")
def two_epochs(finished: Any, distill: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 micro-batches an epoch make nine steps, the last of which has one."""
    run = tmp_path_factory.mktemp("two_epochs") / "run"
    own = [*finished.elsewhere(run), "--evaluate.control", "false"]
    distill("train-student", *own, *TWO_EPOCHS).done()
    return run


@pytest.mark.parametrize("step", [2, 4, 9, 11, 18])
def test_wherever_it_is_stopped_no_sample_is_missed_or_seen_twice(
    train: Any, two_epochs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: int
) -> None:
    """In an epoch, at a measurement, at an epoch's end, in the second epoch, at the last step."""
    interrupt_at(monkeypatch, step)
    assert train(*TWO_EPOCHS).status == 130
    saved = torch.load(last(tmp_path / "run"), weights_only=True)
    assert saved["global_step"] == step
    train(*TWO_EPOCHS, "--resume").done()
    assert_same_weights(tmp_path / "run", two_epochs)


def test_a_second_ctrl_c_stops_at_once_and_costs_the_steps_since_the_last_checkpoint(
    train: Any, two_epochs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interrupt_at(monkeypatch, 7, times=2)
    assert train(*TWO_EPOCHS).status == 130
    saved = torch.load(last(tmp_path / "run"), weights_only=True)
    assert saved["global_step"] == 4
    train(*TWO_EPOCHS, "--resume").done()
    assert_same_weights(tmp_path / "run", two_epochs)


def test_continuing_keeps_the_log_of_before(train: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    often = [*TWO_EPOCHS, "--train.log_every_steps", "1"]
    interrupt_at(monkeypatch, 5)
    assert train(*often).status == 130
    train(*often, "--resume").done()
    steps = []
    for name in ("metrics.1.csv", "metrics.csv"):
        with open(tmp_path / "run/logs/student" / name, encoding="utf-8") as file:
            steps += [int(row["step"]) for row in csv.DictReader(file) if row["loss"]]
    assert steps == list(range(18)), "the step at whose end it was stopped has its line too"


def test_interrupted_before_anything_is_saved_it_begins_again(
    train: Any, two_epochs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interrupt_at(monkeypatch, 2, times=2)
    assert train(*TWO_EPOCHS).status == 130
    assert not list((tmp_path / "run/checkpoints/student").glob("*.ckpt"))
    train(*TWO_EPOCHS, "--resume").done()
    assert_same_weights(tmp_path / "run", two_epochs)


def test_other_settings_do_not_continue_a_training(
    train: Any, monkeypatch: pytest.MonkeyPatch, untouched: Any, tmp_path: Path
) -> None:
    interrupt_at(monkeypatch, 2)
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


def test_a_broken_checkpoint_falls_back_to_the_one_before(
    train: Any, two_epochs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interrupt_at(monkeypatch, 11)
    assert train(*TWO_EPOCHS).status == 130
    found = sorted((tmp_path / "run/checkpoints/student").glob("step-*.ckpt"))
    assert [path.name for path in found] == ["step-00000008.ckpt", "step-00000011.ckpt"]
    content = bytearray(found[1].read_bytes())
    content[len(content) // 2] ^= 1
    found[1].write_bytes(content)
    resumed = train(*TWO_EPOCHS, "--resume").done()
    assert f"{found[1]}: damaged; going back" in resumed.out and f"continuing from {found[0]}" in resumed.out
    assert_same_weights(tmp_path / "run", two_epochs)


def test_only_damaged_checkpoints_are_refused(
    train: Any, monkeypatch: pytest.MonkeyPatch, untouched: Any, tmp_path: Path
) -> None:
    interrupt_at(monkeypatch, 2)
    assert train(*TWO_EPOCHS).status == 130
    os.truncate(last(tmp_path / "run"), 1000)
    before = untouched(tmp_path / "run")
    train(*TWO_EPOCHS, "--resume").refused("all checkpoints are damaged")
    assert untouched(tmp_path / "run") == before


def test_out_of_time_is_a_stop_with_a_checkpoint(train: Any, two_epochs: Path, tmp_path: Path) -> None:
    stopped = train(*TWO_EPOCHS, "--train.max_time", "0s")
    assert stopped.status == 130 and "train.max_time is over at step 1" in stopped.out
    assert "To go on: distill train-student" in stopped.err
    train(*TWO_EPOCHS, "--resume", "--train.max_time", "2h").done()
    assert_same_weights(tmp_path / "run", two_epochs)
    train("--train.max_time", "soon").refused("train.max_time: 'soon'", "11h30m")


def test_early_stopping_hands_over_the_best_weights(
    train: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A learning rate that soon does harm; stopped and resumed, the same."""
    hasty = ["--train.learning_rate", "0.5", "--train.gradient_clip", "0", "--train.validate_every_steps", "2"]
    hasty += ["--train.early_stopping", "2", "--train.warmup_fraction", "0.5", "--train.epochs", "3"]
    early = train(*hasty).done()
    assert "stopping early: 2 measurements" in early.out
    measured = [float(line.split()[4].rstrip(",")) for line in early.out.splitlines() if ": held-out KL" in line]
    assert len(measured) == measured.index(min(measured)) + 3
    best = torch.load(tmp_path / "run/checkpoints/student/best.ckpt", weights_only=True)
    assert best["global_step"] == 2 * (measured.index(min(measured)) + 1)
    ours = weights(tmp_path / "run")
    assert all(torch.equal(best["state_dict"][f"student.model.{name}"], ours[name]) for name in ours)
    resumed = tmp_path / "resumed"
    interrupt_at(monkeypatch, 5)
    assert train(*hasty, "--run_dir", resumed).status == 130
    train(*hasty, "--run_dir", resumed, "--resume").done()
    assert_same_weights(resumed, tmp_path / "run")


def test_less_memory_a_step_goes_on_with_the_same_training(
    train: Any, two_epochs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The advice of the messages about memory works with --resume; another number of samples a step does not."""
    interrupt_at(monkeypatch, 7)
    assert train(*TWO_EPOCHS).status == 130
    train(*TWO_EPOCHS, "--train.batch_size", 1, "--resume").refused(
        "other settings", "samples_a_step: 12 there, 3 here"
    )
    less = ["--train.batch_size", 2, "--train.accumulate_grad_batches", 6, "--train.activation_checkpointing", "true"]
    train(*TWO_EPOCHS, *less, "--loss.chunk_size", 16, "--train.non_finite", "skip", "--resume").done()
    ours, theirs = weights(tmp_path / "run"), weights(two_epochs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4 * float(tensor.norm()))


RANDOM = """
import random
import numpy as np
import torch
from torch import nn
from distill.models.language_model import Head


class Draws(nn.Module):
    # Some packages draw from Python's or numpy's own random numbers, when a layer is made and in its passes.
    def __init__(self, vocab_size: int):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, 16)
        self.scale = nn.Parameter(torch.tensor([random.random(), np.random.rand()], dtype=torch.float32))
        self.same = nn.ParameterList([self.scale] * 6)

    @property
    def head(self):
        return Head(self.tokens.weight)

    def body(self, input_ids, position_ids):
        x = self.tokens(input_ids) * self.scale.sum()
        return x * (0.5 + random.random() + np.random.rand()) if self.training else x
"""


def test_draws_of_python_and_numpy_follow_from_the_seed_too(train: Any, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(RANDOM)
    chosen = ["--student.class_path", f"{tmp_path}/own.py:Draws", "--student.options", "{}", "--train.max_steps", 4]
    chosen += ["--train.checkpoint_every_steps", 1]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(*chosen, "--run_dir", whole).done()
    stopped = train(*chosen, "--run_dir", resumed, "--train.max_time", "0s")
    assert stopped.status == 130, stopped
    train(*chosen, "--run_dir", resumed, "--resume").done()
    files = [(run / "student/model.safetensors").read_bytes() for run in (whole, resumed)]
    assert files[0] == files[1], "its six names for one tensor are written alike too"
    train(*chosen, "--run_dir", tmp_path / "other", "--train.seed", 7).done()
    assert (tmp_path / "other/student/model.safetensors").read_bytes() != files[0]
