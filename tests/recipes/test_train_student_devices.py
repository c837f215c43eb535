"""`--train.devices 2` on the command line trains as one device does, stops, continues, and leaves nothing behind."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

PATIENCE = 180.0

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")

# An epoch is 25 steps, of which the last has three samples.
STEPS = ["--train.epochs", "2", "--train.max_steps", "30", "--train.validate_every_steps", "5"]
STEPS += ["--train.log_every_steps", "1", "--train.checkpoint_every_steps", "10", "--evaluate.control", "false"]
STEPS += ["--train.accelerator", "cpu", "--train.precision", "32-true"]
SMALL = ["--student.options", json.dumps({"hidden_size": 16, "layers": 2, "heads": 2})]
COMPACT = ["--student.class_path", "compact", *SMALL]


def two(strategy: str) -> list[str]:
    """As many samples a step, half of them on each device."""
    return ["--train.devices", "2", "--train.strategy", strategy, "--train.batch_size", "2"]


@dataclass(frozen=True)
class Ended:
    """The end of a command in separate processes, and their output."""

    status: int
    lines: list[str]

    def done(self) -> Ended:
        assert self.status == 0, self.lines
        return self.checked()

    def checked(self) -> Ended:
        """Nothing was said twice, and nothing is a traceback."""
        assert max(Counter(self.lines).values()) == 1, self.lines
        assert not any("Traceback" in line for line in self.lines), self.lines
        return self


Command = Callable[..., Ended]


def make_command(program: Any) -> Command:
    """`command("run", file, ...)`: run it to its end, or `send` a signal to its first process `when` a line is said."""
    starting = threading.Lock()  # or a command's process would hold another's output

    def command(*arguments: str, when: str | None = None, send: int = signal.SIGTERM) -> Ended:
        with starting:
            reading, to = os.pipe()
            running = program([*arguments], to, to)
            os.close(to)
        late = threading.Timer(PATIENCE, running.send, [signal.SIGKILL])
        late.start()
        lines = []
        with open(reading) as said:
            # The pipe ends when the last process that holds it has ended.
            for text in said:
                lines.append(text.rstrip())
                if when is not None and when in text:
                    running.send(send)
                    when = None
        late.cancel()
        return Ended(running.wait(), lines)

    return command


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
def on_one(finished: Any, distill: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run folders of the same trainings on one device, by their students."""
    runs = {name: tmp_path_factory.mktemp(name) / "run" for name in ("pruned", "compact")}
    for name, more in (("pruned", []), ("compact", COMPACT)):
        distill("train-student", *finished.elsewhere(runs[name]), *STEPS, *more).done()
    return runs


def stop_and_go_on(command: Command, name: str, arguments: list[str], run: Path, send: int) -> Path:
    """A signal to the first process alone; then the training goes on."""
    stopped = command(name, *arguments, when="step 5: held-out KL", send=send).checked()
    assert stopped.status == 130 and not (run / "student").exists(), stopped.lines
    newest = max((run / "checkpoints/student").glob("step-*.ckpt"))
    assert 5 <= torch.load(newest, weights_only=True)["global_step"] < 30
    suggested = [line.partition("To go on: ")[2] for line in stopped.lines if "To go on" in line]
    resume = ["--resume"] if name == "train-student" else []
    assert [shlex.split(line) for line in suggested] == [["distill", name, *arguments, *resume]]
    continued = command("train-student", *arguments, "--resume").done()
    assert f"student: continuing from {newest}" in continued.lines
    return run


STUDENTS = '''"""Students that cannot be trained: on any device, or on one."""
import os

import torch

from students.compact import CompactDecoder


class Sick(CompactDecoder):
    def body(self, input_ids_BL, position_ids_BL):
        hidden_BLD = super().body(input_ids_BL, position_ids_BL)
        return hidden_BLD / 0 if torch.is_grad_enabled() and torch.distributed.is_initialized() else hidden_BLD


class Alone(CompactDecoder):
    def body(self, input_ids_BL, position_ids_BL):
        trains = torch.is_grad_enabled() and torch.distributed.is_initialized()
        if trains and os.environ.get("LOCAL_RANK") == "1":
            raise ValueError("this device is too small")
        return super().body(input_ids_BL, position_ids_BL)
'''


@pytest.fixture(scope="module")
def started(
    finished: Any, on_one: Any, program: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """All commands of this file, two at a time (their processes spend most of the time with imports), but one `run`:
    it holds the cache. They are begun when this process computes no more, since they are forks of it."""
    folder = tmp_path_factory.mktemp("devices")
    (folder / "students.py").write_text(STUDENTS)
    command = make_command(program)

    def arguments(name: str, *more: str) -> list[str]:
        return [*finished.elsewhere(folder / name), *STEPS, *more]

    def failing(name: str) -> list[str]:
        return arguments(name, "--student.class_path", f"{folder / 'students.py'}:{name}", *SMALL, *two("ddp"))

    ddp, fsdp = arguments("stopped ddp", *two("ddp")), arguments("stopped fsdp", *COMPACT, *two("fsdp"))
    with ThreadPoolExecutor(1) as runs, ThreadPoolExecutor(1) as trainings:
        yield {
            "run": runs.submit(command, "run", *arguments("run", *two("ddp"))),
            "ddp": runs.submit(stop_and_go_on, command, "run", ddp, folder / "stopped ddp", signal.SIGTERM),
            "fsdp": trainings.submit(
                stop_and_go_on, command, "train-student", fsdp, folder / "stopped fsdp", signal.SIGINT
            ),
            "sick": trainings.submit(command, "train-student", *failing("Sick")),
            "alone": trainings.submit(command, "train-student", *failing("Alone")),
            "folder": folder,
        }


def test_run_on_two_devices_does_all_steps_once_and_trains_as_one_device(on_one: Any, started: Any) -> None:
    said = "\n".join(started["run"].result().done().lines)
    for part in ("nothing to do", "student: pruned", "step 30: held-out KL", "30 of 30 steps", "held-out positions"):
        assert part in said, (part, said)
    run = started["folder"] / "run"
    check_curves(run, on_one["pruned"])
    assert distance(run, on_one["pruned"]) < 1e-4
    assert set(json.loads((run / "evaluation.json").read_text())["fidelity"]) >= {"teacher", "student", "before"}
    assert not list(run.rglob("*.tmp"))


def test_stopped_and_continued_fsdp_trains_as_one_device(on_one: Any, started: Any) -> None:
    """With tied embeddings, of which a checkpoint has both names."""
    run = started["fsdp"].result()
    check_curves(run, on_one["compact"], but=1)
    assert distance(run, on_one["compact"]) < 1e-4


def test_stopped_and_continued_ddp_ends_with_the_very_weights(started: Any) -> None:
    run = started["ddp"].result()
    started["run"].result()
    assert distance(run, started["folder"] / "run") == 0


def test_what_all_devices_meet_is_told_once(started: Any) -> None:
    ended = started["sick"].result().checked()
    assert ended.status == 2
    assert len([line for line in ended.lines if line.startswith("distill: step 1: the loss is")]) == 1, ended.lines


def test_what_one_device_meets_ends_all(started: Any) -> None:
    ended = started["alone"].result().checked()
    (number,) = [n for n, line in enumerate(STUDENTS.splitlines(), start=1) if "too small" in line]
    assert ended.status == 2
    said = [line for line in ended.lines if line.startswith("distill: ")]
    assert len(said) == 1 and f"ValueError: this device is too small (students.py, line {number})" in said[0], said
    assert not (started["folder"] / "Alone/student").exists()
