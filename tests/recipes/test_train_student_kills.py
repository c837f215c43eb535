"""A training may end in any way and at any time: continued, it makes the same student as an undisturbed one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.report.curves import read_curves

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_kills_at_random_instants_change_no_bit_of_the_student() -> None:
    """The real command, killed 10 times; tests/benchmarks/train_kill_storm.py throws as many kills as one likes.

    The student has dropout, the steps are accumulated, and kills fall anywhere from the first step to the saving.
    """
    storm = [sys.executable, str(BENCHMARKS / "train_kill_storm.py"), "--kills", "10"]
    done = subprocess.run(storm, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    hits = {words: int(count) for count, words in re.findall(r"^ *(\d+)  (.*)$", done.stdout, flags=re.MULTILINE)}
    assert any(words.startswith("kills, ") and count == 10 for words, count in hits.items())
    by_signal = {name: sum(n for words, n in hits.items() if words.startswith(name)) for name in ("SIGKILL", "SIG")}
    assert by_signal["SIG"] == 10 and by_signal["SIGKILL"] > 2
    assert hits["SIGKILL  between checkpoints"] > 0  # or the kills were not where the training is


@pytest.mark.usefixtures("one_thread")
def test_a_training_that_is_stopped_after_every_single_step(train: Any, contents: Any, tmp_path: Path) -> None:
    """Among them all pairs of stops around the ends of epochs, which Lightning counts in ways of their own."""
    gpt2 = "{config: {model_type: gpt2, n_embd: 16, n_layer: 1, n_head: 2, n_positions: 64}}"  # its dropout is 0.1
    arguments = ["--student.class_path", "huggingface", "--student.options", gpt2]
    arguments += ["--train.batch_size", "15", "--train.accumulate_grad_batches", "2", "--train.epochs", "3"]
    arguments += ["--train.validate_every_steps", "3", "--train.log_every_steps", "2", "--train.keep_checkpoints", "1"]
    train(*arguments, "--run_dir", tmp_path / "undisturbed").done()
    steps = 3 * 4  # the last one of an epoch has 9 samples of 99
    for step in range(1, steps + 1):
        stopped = train(*arguments, "--train.max_time", "0s", "--resume")
        assert stopped.status == 130 and f"train.max_time is over at step {step}\n" in stopped.out, stopped
        assert [path.stem for path in (tmp_path / "run/checkpoints/student").glob("step-*")] == [f"step-{step:08}"]
    train(*arguments, "--resume").done()
    assert contents(tmp_path / "run/student") == contents(tmp_path / "undisturbed/student")
    undisturbed, stopped = (read_curves(tmp_path / run / "logs/student") for run in ("undisturbed", "run"))
    assert stopped == undisturbed and [step for step, _ in stopped["loss"]] == [1, 3, 5, 7, 9, 11]
