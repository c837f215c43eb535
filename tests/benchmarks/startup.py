"""Seconds that a user waits for nothing: the help, a command's first line, a run in which everything is done.

`python tests/benchmarks/bench.py --only startup`. Each row compares with its aim in seconds.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from paired import Row, Setup, cost_apart, number_row

ROOT = Path(__file__).resolve().parents[2]
DISTILL = [sys.executable, "-m", "distill.cli"]
SMALL = (
    *("--corpus.sequence_length", "32", "--cache.max_samples", "4", "--cache.held_out_samples", "1"),
    *("--train.batch_size", "1", "--train.max_steps", "1", "--preflight", "false"),
    *("--evaluate.control", "false", "--evaluate.max_samples", "1", "--evaluate.cost", "false"),
    *("--evaluate.tasks", "[]", "--evaluate.texts", "0"),
)


def rows(setup: Setup) -> Iterator[Row]:
    """Yield the medians of wall time, in shares of their aims."""
    yield _row(setup, "distill --help", 0.1, lambda: cost_apart([*DISTILL, "--help"]).wall)
    with tempfile.TemporaryDirectory() as folder:
        run = [*DISTILL, "run", "configs/demo.yaml", "--run_dir", f"{folder}/run", *SMALL]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(run, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        yield _row(setup, "first line of distill run", 2.0, lambda: first_line(run, environment))
        yield _row(setup, "distill run, everything done", 6.0, lambda: whole(run, environment))


def _row(setup: Setup, case: str, aim: float, seconds: Callable[[], float]) -> Row:
    seconds()  # the first start reads the libraries from the disk
    median = statistics.median(seconds() for _ in range(setup.repeats))
    return number_row("startup", case, "seconds of its aim", median, aim, "{:.2f} s", "≤ 1")


def first_line(command: list[str], environment: dict[str, str]) -> float:
    """Return the seconds to the first line of a command, which then goes on to its end."""
    begin = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline()
        seconds = time.perf_counter() - begin
        process.communicate()
    return seconds


def whole(command: list[str], environment: dict[str, str]) -> float:
    """Return the seconds of a command."""
    begin = time.perf_counter()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


if __name__ == "__main__":
    for row in rows(Setup(repeats=3)):
        print(row)
