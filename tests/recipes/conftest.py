"""One finished experiment, which several tests look at and train further students from."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120.0
"""Seconds that a process of its own may take to get going on a busy machine."""


@dataclass(frozen=True)
class Finished:
    """An experiment that ran to its end: its file, its run folder, its cache, and what the command said."""

    file: str
    run: Path
    outcome: Any

    @property
    def cache(self) -> Path:
        return self.run / "cache"

    def elsewhere(self, folder: Path) -> list[str]:
        """Arguments for a run of one's own in `folder` on the same cache."""
        return [self.file, "--run_dir", str(folder), "--cache.dir", str(self.cache)]


@pytest.fixture(scope="session")
def finished(world: Any, distill: Any, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """`distill run` with a control, from nothing."""
    folder = tmp_path_factory.mktemp("finished")
    file = world.write(folder / "experiment.yaml", evaluate={"control": True})
    return Finished(file, folder / "run", distill("run", file).done())


@pytest.fixture
def train(finished: Finished, distill: Any, tmp_path: Path) -> Callable[..., Any]:
    """`train("--train.max_steps", 3)`: train a student in the test's own run folder on the finished cache."""

    def command(*arguments: object) -> Any:
        own = [*finished.elsewhere(tmp_path / "run"), "--evaluate.control", "false"]
        return distill("train-student", *own, *arguments)

    return command


@pytest.fixture
def make_teacher(world: Any, tmp_path: Path) -> Callable[..., str]:
    """`make_teacher("mamba2")`: the folder of another tiny teacher; sizes and `seed` as keywords."""

    def make(family: str, **sizes: Any) -> str:
        return str(world.save_teacher(tmp_path / f"{family}-teacher", family, **sizes))

    return make


@pytest.fixture
def mamba2() -> dict[str, Any]:
    """The `config` of a tiny recurrent student."""
    return {
        "model_type": "mamba2",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "state_size": 8,
        "num_heads": 4,
        "head_dim": 8,
        "expand": 2,
        "n_groups": 2,
        "chunk_size": 8,
    }


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, str]]:
    """`contents(folder)`: the hash of every file below a folder."""

    def look(folder: Path) -> dict[str, str]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    return look


@pytest.fixture(scope="session")
def untouched(contents: Any) -> Callable[[Path], Any]:
    """`untouched(folder)`: every file's hash and time of change; equal before and after: nothing was written."""

    def look(folder: Path) -> Any:
        times = {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
        return contents(folder), times

    return look


@dataclass(frozen=True)
class Stopped:
    """The end of a process that was sent a signal."""

    status: int
    out: str
    err: str


@pytest.fixture
def stop(tmp_path: Path) -> Callable[..., Stopped]:
    """`stop(signal, when, *arguments)`: run a command in a process of its own; signal it once `when(stdout)` holds."""

    def command(signum: signal.Signals, when: Callable[[str], bool], *arguments: str) -> Stopped:
        out, err = tmp_path / "stdout.txt", tmp_path / "stderr.txt"
        with open(out, "wb") as to_out, open(err, "wb") as to_err:
            line = [sys.executable, "-m", "distill", *arguments]
            with subprocess.Popen(line, cwd=ROOT, stdout=to_out, stderr=to_err) as process:
                deadline = time.monotonic() + PATIENCE
                while not when(out.read_text()) and process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.002)
                process.send_signal(signum)
                status = process.wait(PATIENCE)
        return Stopped(status, out.read_text(), err.read_text())

    return command
