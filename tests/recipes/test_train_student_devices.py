"""`--train.devices 2` on the command line: the training of one device, stopped and continued, with nothing left over."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 180.0

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")

# An epoch is 25 steps, of which the last has three samples.
STEPS = ["--train.epochs", "2", "--train.max_steps", "30", "--train.validate_every_steps", "5"]
STEPS += ["--train.log_every_steps", "1", "--train.checkpoint_every_steps", "10", "--evaluate.control", "false"]
STEPS += ["--train.accelerator", "cpu", "--train.precision", "32-true"]
COMPACT = ["--student.class_path", "compact", "--student.options", json.dumps({"hidden_size": 16, "layers": 2})]
COMPACT[-1] = json.dumps({"hidden_size": 16, "layers": 2, "heads": 2})


def two(strategy: str) -> list[str]:
    """As many samples a step, half of them on each device."""
    return ["--train.devices", "2", "--train.strategy", strategy, "--train.batch_size", "2"]


class Ended:
    """A command in processes of its own that has ended, and all of its processes with it."""

    def __init__(self, *arguments: str, when: Callable[[str], bool] | None = None, send: int = signal.SIGTERM) -> None:
        line = [sys.executable, "-m", "distill.cli", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(line, cwd=ROOT, env=environment, **pipes) as process:
            assert process.stdout is not None
            begun, lines = time.monotonic(), []
            # The pipe ends when the last process that holds it has ended.
            for text in process.stdout:
                lines.append(text.rstrip())
                if when is not None and when(text):
                    process.send_signal(send)
                    when = None
                assert time.monotonic() - begun < PATIENCE
        self.status, self.lines = process.returncode, lines

    def done(self) -> Ended:
        assert self.status == 0, self.lines
        return self.checked()

    def checked(self) -> Ended:
        """Nothing was said twice, and nothing is a traceback."""
        assert max(Counter(self.lines).values()) == 1, self.lines
        assert not any("Traceback" in line for line in self.lines), self.lines
        return self


def logged(run: Path, column: str) -> dict[int, float]:
    """Value by step, of all starts."""
    values = {}
    for path in sorted((run / "logs/student").glob("metrics*.csv"), key=lambda path: path.stat().st_mtime):
        with open(path, encoding="utf-8") as file:
            values |= {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row[column]}
    return values


def check_curves(run: Path, one: Path, but: int = 0) -> None:
    """To 1e-5, in all steps but as many."""
    for column in ("loss", "gradient_norm", "held_out_kl", "held_out_loss"):
        ours, theirs = logged(run, column), logged(one, column)
        assert len(theirs) == (30 if column in ("loss", "gradient_norm") else 6)
        assert ours.keys() <= theirs.keys() and len(ours) >= len(theirs) - but
        assert ours == pytest.approx({step: theirs[step] for step in ours}, rel=1e-5)


def distance(run: Path, other: Path) -> float:
    """The largest difference of a weight; every file that is in one folder is in both."""
    assert {path.name for path in (run / "student").iterdir()} == {path.name for path in (other / "student").iterdir()}
    ours, theirs = (load_file(folder / "student/model.safetensors") for folder in (run, other))
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.fixture(scope="module")
def on_one(finished: Any, distill: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def train(*arguments: str) -> Path:
        run = tmp_path_factory.mktemp("one") / "run"
        distill("train-student", *finished.elsewhere(run), *STEPS, *arguments).done()
        return run

    return train


@pytest.fixture(scope="module")
def ddp(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """`distill run` on two devices, undisturbed."""
    run = tmp_path_factory.mktemp("ddp") / "run"
    return run, Ended("run", *finished.elsewhere(run), *STEPS, *two("ddp"))


def test_run_on_two_devices_does_all_steps_once_and_trains_as_one_device(on_one: Any, ddp: Any) -> None:
    run, ended = ddp
    said = "\n".join(ended.done().lines)
    for part in ("nothing to do", "student: pruned", "step 30: held-out KL", "30 of 30 steps", "measured on", "nll"):
        assert part in said, (part, said)
    one = on_one()
    check_curves(run, one)
    assert distance(run, one) < 1e-4
    assert set(json.loads((run / "evaluation.json").read_text())) > {"teacher", "student", "before"}
    assert not list(run.rglob("*.tmp"))


def last(run: Path) -> dict[str, Any]:
    return torch.load(max((run / "checkpoints/student").glob("step-*.ckpt")), weights_only=True)


def stop_and_go_on(command: str, arguments: list[str], run: Path, number: int) -> None:
    """A signal to the first process alone; then the command that was suggested."""
    stopped = Ended(command, *arguments, when=lambda text: "step 5: held-out KL" in text, send=number).checked()
    assert stopped.status == 130 and not (run / "student").exists(), stopped.lines
    suggested = [line for line in stopped.lines if "To go on" in line]
    assert len(suggested) == 1
    assert 5 <= last(run)["global_step"] < 30
    again = suggested[0].partition("To go on: distill ")[2].replace("'", "")
    assert again.startswith(" ".join([command, *arguments]).replace("'", ""))
    extra = ["--resume"] if command == "train-student" else []
    continued = Ended("train-student", *arguments, *(extra or ["--resume"])).done()
    assert "student: continuing from" in "\n".join(continued.lines)


def test_stopped_and_continued_ddp_ends_with_the_very_weights(finished: Any, ddp: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stop_and_go_on("run", [*finished.elsewhere(run), *STEPS, *two("ddp")], run, signal.SIGTERM)
    assert distance(run, ddp[0]) == 0


def test_stopped_and_continued_fsdp_trains_as_one_device(finished: Any, on_one: Any, tmp_path: Path) -> None:
    """With tied embeddings, of which a checkpoint has both names."""
    run = tmp_path / "run"
    stop_and_go_on("train-student", [*finished.elsewhere(run), *STEPS, *COMPACT, *two("fsdp")], run, signal.SIGINT)
    one = on_one(*COMPACT)
    check_curves(run, one, but=1)
    assert distance(run, one) < 1e-4


def test_what_all_devices_meet_is_told_once(finished: Any, tmp_path: Path) -> None:
    hasty = ["--train.learning_rate", "1e30", "--train.gradient_clip", "0", *two("ddp")]
    ended = Ended("run", *finished.elsewhere(tmp_path / "run"), *STEPS, *hasty).checked()
    assert ended.status == 2
    assert len([line for line in ended.lines if line.startswith("distill: step")]) == 1, ended.lines


ALONE = '''"""A student that one device cannot train."""
import os

from students.compact import CompactDecoder


class Alone(CompactDecoder):
    def body(self, input_ids_BL, position_ids_BL):
        if self.training and os.environ.get("LOCAL_RANK") == "1":
            raise ValueError("this device is too small")
        return super().body(input_ids_BL, position_ids_BL)
'''


def test_what_one_device_meets_ends_all(finished: Any, tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text(ALONE)
    student = ["--student.class_path", f"{tmp_path / 'alone.py'}:Alone", *COMPACT[2:]]
    ended = Ended("train-student", *finished.elsewhere(tmp_path / "run"), *STEPS, *student, *two("ddp"))
    assert ended.status not in (0, 130)
    assert any("this device is too small" in line for line in ended.lines), ended.lines
    assert not (tmp_path / "run/student").exists()
