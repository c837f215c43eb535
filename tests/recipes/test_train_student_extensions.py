"""A user's own file, outside the repository: callbacks that a resumed training continues, and a mixture of experts."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCE = '''
import os
import signal

import lightning.pytorch as pl
import torch
from torch import nn

from distill.models.language_model import Head


class Experts(nn.Module):
    """Two experts for each token; their balance is measured on each sample."""

    def __init__(self, vocab_size: int, size: int = 16, coefficient: float = 0.1):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, size)
        self.router = nn.Linear(size, 2)
        self.experts = nn.ModuleList(nn.Linear(size, size) for _ in range(2))
        self.output = nn.Linear(size, vocab_size)
        self.coefficient = coefficient

    @property
    def head(self):
        return Head(self.output.weight, self.output.bias)

    def body(self, input_ids_BL, position_ids_BL):
        hidden_BLD = self.embedding(input_ids_BL)
        share_BLE = self.router(hidden_BLD).softmax(-1)
        for number, expert in enumerate(self.experts):
            hidden_BLD = hidden_BLD + share_BLE[..., number, None] * torch.tanh(expert(hidden_BLD))
        balance_B = 2 * share_BLE.mean(1).square().sum(-1)
        return hidden_BLD, self.coefficient * input_ids_BL.shape[1] * balance_B.sum()


class Shrink(pl.Callback):
    """Shrinks the weights after each step, less and less; how often is its state."""

    times = 0

    def on_train_batch_end(self, trainer, pl_module, *rest):
        self.times += 1
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(1 - 0.1 / self.times)

    def state_dict(self):
        return {"times": self.times}

    def load_state_dict(self, state):
        self.times = state["times"]


class Stop(pl.Callback):
    """Ctrl-C after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *rest):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


class Failing(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, *rest):
        pl_module.no_such_thing


class Odd(Shrink):
    def state_dict(self):
        return {"itself": Stop(1)}
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file."""
    file = tmp_path_factory.mktemp("own") / "own.py"
    file.write_text(SOURCE)
    return str(file)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student/model.safetensors")


def test_a_callback_that_moves_the_weights_is_resumed_to_the_bit(
    finished: Any, distill: Any, own: str, tmp_path: Path
) -> None:
    """Stopped by a callback that is not there any more when it goes on: callbacks are noted, and may change."""

    def train(run: str, *more: object) -> Any:
        short = ["--evaluate.control", "false", "--train.max_steps", 9]
        return distill("train-student", *finished.elsewhere(tmp_path / run), *short, *more)

    shrink = f"{own}:Shrink"
    train("undisturbed", "--train.callbacks", f"[{shrink}]").done()
    stop = f"{{class_path: {own}:Stop, init_args: {{step: 4}}}}"
    assert train("stopped", "--train.callbacks", f"[{shrink}, {stop}]").status == 130
    noted = json.loads((tmp_path / "stopped/checkpoints/student/settings.json").read_text())
    assert "Shrink" in json.dumps(noted["may_change"]["callbacks"])
    train("stopped", "--train.callbacks", f"[{shrink}]", "--resume").done()
    train("plain").done()
    undisturbed, stopped, plain = (weights(tmp_path / run) for run in ("undisturbed", "stopped", "plain"))
    assert all(torch.equal(undisturbed[name], stopped[name]) for name in plain)
    assert not any(torch.equal(undisturbed[name], plain[name]) for name in plain if plain[name].ndim > 1)


def test_what_cannot_be_resumed_is_refused_when_it_would_be_saved(train: Any, own: str, tmp_path: Path) -> None:
    train("--train.max_steps", 2, "--train.callbacks", f"[{own}:Odd]").refused(
        "train.callbacks: Odd", "state_dict()", "numbers"
    )
    assert not list((tmp_path / "run/checkpoints/student").glob("step-*.ckpt"))


def test_a_callback_that_fails_is_named_with_its_line(train: Any, own: str) -> None:
    line = SOURCE[: SOURCE.index("no_such_thing")].count("\n") + 1
    stopped = train("--train.callbacks", f"[{own}:Failing]")
    stopped.refused("no_such_thing", f"own.py, line {line}")


def test_a_wrong_callback_is_refused_before_the_teacher_reads(
    world: Any, distill: Any, own: str, tmp_path: Path
) -> None:
    file = world.write(tmp_path / "experiment.yaml")
    distill("run", file, "--train.callbacks", f"[{own}:Shrunk]").refused("did you mean 'Shrink'")
    assert not (tmp_path / "run/cache").exists()


def test_a_mixture_of_experts_goes_all_the_way(
    train: Any, finished: Any, distill: Any, own: str, tmp_path: Path
) -> None:
    """Forecast, trained, logged, measured and exported."""
    student = ["--student.class_path", f"{own}:Experts", "--student.options", "{size: 16}"]
    runs = [*finished.elsewhere(tmp_path / "run"), "--evaluate.control", "false", *student]
    train(*student, "--train.log_every_steps", 1, "--preflight", "true").done()
    with open(tmp_path / "run/logs/student/metrics.csv", encoding="utf-8") as file:
        balances = [float(row["auxiliary_loss"]) for row in csv.DictReader(file) if row.get("auxiliary_loss")]
    assert len(balances) >= 8 and all(0.1 <= balance <= 0.2 for balance in balances)
    distill("evaluate", *runs, "--evaluate.cost", "false", "--evaluate.texts", 1).done()
    distill("export", tmp_path / "run", "--to", tmp_path / "hf", "--with_code", "--class_path", f"{own}:Experts").done()
