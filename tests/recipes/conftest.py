"""One finished experiment, which several tests look at and train further students from."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

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


@dataclass(frozen=True)
class Begun:
    """A process that runs a command, and the files that have its output."""

    process: Any
    out: Path
    err: Path

    def ended(self) -> Stopped:
        """Wait for its end; one that hangs is killed."""
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        said = [path.read_text() if path.exists() else "" for path in (self.out, self.err)]
        return Stopped(self.process.exitcode, *said)


def _become(arguments: list[str], out: Path | int, err: Path | int) -> None:
    """Run a command as a program of its own does, in this fork of the tests' process."""
    import torch
    from tqdm import tqdm

    from distill.cli import main

    for to, number in ((out, 1), (err, 2)):
        os.dup2(to if isinstance(to, int) else os.open(to, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    tqdm.set_lock(threading.RLock())  # the one of before is shared with the tests
    sys.argv = ["distill", *arguments]
    main()


@pytest.fixture
def begin(tmp_path: Path) -> Callable[..., Begun]:
    """`begin("run", file)`: start a command in a process of its own: a fork, which has imported everything already.

    `to` is a descriptor for all of its output, which goes to files in the test's folder otherwise.
    """

    def command(*arguments: str, to: int | None = None) -> Begun:
        files = tmp_path / "stdout.txt", tmp_path / "stderr.txt"
        places = files if to is None else (to, to)
        process = multiprocessing.get_context("fork").Process(target=_become, args=([*arguments], *places))
        process.start()
        return Begun(process, *files)

    return command


@pytest.fixture
def stop(begin: Any) -> Callable[..., Stopped]:
    """`stop(signal, when, *arguments)`: begin a command, and signal it once `when(stdout)` holds."""

    def command(signum: signal.Signals, when: Callable[[str], bool], *arguments: str) -> Stopped:
        begun = begin(*arguments)
        deadline = time.monotonic() + PATIENCE
        while not (begun.out.exists() and when(begun.out.read_text())) and begun.process.is_alive():
            assert time.monotonic() < deadline, begun.out.read_text()
            time.sleep(0.005)
        if begun.process.is_alive():
            os.kill(begun.process.pid, signum)
        return begun.ended()

    return command
