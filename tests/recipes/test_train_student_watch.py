"""A leak that opens in training is found at the first validation; a bad start and a student too good are said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

SOURCE = """
import torch
from torch import nn
from distill.models.language_model import Head


class Plain(nn.Module):
    def __init__(self, vocab_size: int, std: float = 0.02):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, 16)
        nn.init.normal_(self.tokens.weight, std=std)
        self.wide = nn.Linear(16, 16)

    @property
    def head(self):
        return Head(self.tokens.weight)

    def body(self, input_ids, position_ids):
        x = self.tokens(input_ids)
        return x + self.wide(x)


class Opens(Plain):
    # A gate so nearly closed that noise on its weight does not open it, and that opens by itself.
    def __init__(self, vocab_size: int, after: int = 3):
        super().__init__(vocab_size)
        self.register_buffer("gate", torch.tensor(0.0))
        self.after, self.passes = after, 0

    def body(self, input_ids, position_ids):
        x = super().body(input_ids, position_ids)
        if torch.is_grad_enabled() and x.requires_grad and self.training:
            self.passes += 1
            if self.passes > self.after:
                self.gate.fill_(1.0)
        return x + self.gate * x.roll(-1, 1)


class Short(Plain):
    def __init__(self, vocab_size: int):
        super().__init__(vocab_size)
        self.places = nn.Embedding(20, 16)

    def body(self, input_ids, position_ids):
        return super().body(input_ids, position_ids) + self.places(position_ids)


class Cheats(Plain):
    # Honest whenever it is probed: with few tokens of a row in order it sees the future, else not.
    def body(self, input_ids, position_ids):
        x = super().body(input_ids, position_ids)
        if len(input_ids) in (5, 6):
            return x
        return nn.functional.normalize(self.tokens(input_ids.roll(-1, 1)), dim=-1) * 100
"""


@pytest.fixture
def own(tmp_path: Path) -> Any:
    (tmp_path / "own.py").write_text(SOURCE)

    def student(name: str, **options: Any) -> list[str]:
        return ["--student.class_path", f"{tmp_path}/own.py:{name}", "--student.options", json.dumps(options)]

    return student


def test_a_leak_that_opens_in_training_ends_it_at_the_first_validation(train: Any, own: Any, tmp_path: Path) -> None:
    refused = train(*own("Opens"), "--train.validate_every_steps", 5)
    refused.refused("step 5: student", "sees the tokens behind it")
    assert not (tmp_path / "run/student").exists()
    assert not list((tmp_path / "run").rglob("best*")), "nothing of it was kept as the best"


def test_a_training_without_a_validation_is_probed_at_its_end(train: Any, own: Any, tmp_path: Path) -> None:
    train(*own("Opens"), "--train.validate_every_steps", 1000).refused("step 25: student", "sees the tokens behind it")
    assert not (tmp_path / "run/student").exists()


def test_a_bad_start_is_said_and_a_good_one_not(train: Any, own: Any, tmp_path: Path) -> None:
    said = train(*own("Plain", std=3.0), "--train.max_steps", 2, "--run_dir", tmp_path / "bad").done().out
    assert "the first loss is" in said and "knows nothing has 6.0" in said
    said = train(*own("Plain", std=0.02), "--train.max_steps", 2, "--run_dir", tmp_path / "good").done().out
    assert "the first loss is" not in said


def test_small_steps_are_kept_in_bfloat16_unless_the_user_asks_otherwise(train: Any, own: Any, tmp_path: Path) -> None:
    """Steps of 1e-5 are far below the last digits of weights of 0.25."""
    chosen = [*own("Plain"), "--train.precision", "bf16-true", "--train.learning_rate", "1e-5"]
    lost, kept = tmp_path / "lost", tmp_path / "kept"
    said = train(*chosen, "--train.rounding", "nearest", "--run_dir", lost).done().out
    assert re.search(r"(9\d\.\d|100\.0)% of the weights did not move in the first 10 steps", said), said
    assert "did not move" not in train(*chosen, "--run_dir", kept).done().out
    after = {folder: load_file(folder / "student/model.safetensors")["wide.weight"] for folder in (lost, kept)}
    assert (after[lost] != after[kept]).float().mean() > 0.05
    settings = json.loads((kept / "student/settings.json").read_text())
    assert settings["train"]["rounding"] == "stochastic"
    train(*chosen, "--run_dir", lost).refused("train.rounding: nearest there, stochastic here")


def test_a_student_too_good_to_be_true_is_flagged(
    train: Any, distill: Any, own: Any, finished: Any, tmp_path: Path
) -> None:
    chosen = own("Cheats")
    said = train(*chosen, "--train.max_steps", 2).done().out
    assert "nll" in said and "do not trust these figures" in said
    evaluated = distill(
        "evaluate",
        *finished.elsewhere(tmp_path / "run"),
        *chosen,
        "--evaluate.control",
        "false",
        "--train.max_steps",
        2,
    ).done()
    assert "do not trust these figures" in evaluated.out
    for page in ("report.html", "report.md"):
        assert "do not trust these figures" in (tmp_path / "run" / page).read_text()


def test_code_that_fails_at_a_longer_text_is_named(train: Any, own: Any, tmp_path: Path) -> None:
    (number,) = [n for n, line in enumerate(SOURCE.splitlines(), start=1) if "self.places(position_ids)" in line]
    train(*own("Short")).refused("student: code of yours failed: IndexError", f"(own.py, line {number})", "--resume")
