"""One finished experiment, which several tests look at and train further students from."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

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


class Program:
    """A command in a process of its own: a fork of this one, which has imported everything, where a fork can do all.

    It cannot where CUDA is, which does not survive it; there the command starts from nothing.
    """

    def __init__(self, arguments: list[str], out: int, err: int) -> None:
        """Start it with these descriptors for its output."""
        import torch

        self._end = threading.Lock()
        self.status: int | None = None
        """Exit status, or the number of the signal that killed it below 0, once `poll` has found it."""
        can_fork = hasattr(os, "fork") and not torch.cuda.is_available()
        self.pid = os.fork() if can_fork else 0
        self._spawned: Any = None
        if not can_fork:
            line = [sys.executable, "-m", "distill", *arguments]
            self._spawned = subprocess.Popen(line, cwd=ROOT, stdout=out, stderr=err)
            self.pid = self._spawned.pid
        elif not self.pid:
            _become(arguments, out, err)

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""
        with self._end:
            if self.status is None and self._spawned is not None:
                self.status = self._spawned.poll()
            elif self.status is None:
                ended, status = os.waitpid(self.pid, os.WNOHANG)
                self.status = os.waitstatus_to_exitcode(status) if ended else None
            return self.status

    def send(self, signum: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def wait(self, until: Callable[[], Any] = bool) -> int | None:
        """Wait for its end, or `until` something holds, and return its status; one that hangs is killed."""
        deadline = time.monotonic() + PATIENCE
        while self.poll() is None and not until():
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            time.sleep(0.005)
        return self.status


def _become(arguments: list[str], out: int, err: int) -> NoReturn:
    """Run a command as a program of its own does, in this fork of the tests' process."""
    status = 1
    try:
        import torch
        from tqdm import tqdm

        import distill.__main__ as program
        from distill.cli import main

        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        tqdm.set_lock(threading.RLock())  # the one of before is shared with the tests
        # Lightning starts the processes of other devices by the command line of this one.
        os.environ |= {"OMP_NUM_THREADS": "1"}
        sys.modules["__main__"], sys.argv = program, ["distill", *arguments]
        main()
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)


@pytest.fixture(scope="session")
def program() -> type[Program]:
    return Program


@pytest.fixture
def stop(tmp_path: Path) -> Callable[..., Stopped]:
    """`stop(signal, when, *arguments)`: run a command in a process of its own; signal it once `when(stdout)` holds."""

    def command(signum: signal.Signals, when: Callable[[str], bool], *arguments: str) -> Stopped:
        out, err = tmp_path / "stdout.txt", tmp_path / "stderr.txt"
        with open(out, "wb") as to_out, open(err, "wb") as to_err:
            running = Program([*arguments], to_out.fileno(), to_err.fileno())
        running.wait(lambda: when(out.read_text()))
        running.send(signum)
        status = running.wait()
        assert status is not None
        return Stopped(status, out.read_text(), err.read_text())

    return command
