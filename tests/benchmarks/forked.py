"""Real commands in processes that are forked from one which has imported everything: hundreds fit into minutes."""

from __future__ import annotations

import os

# Before anything heavy is imported: a process with threads cannot be forked safely.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import argparse
import json
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

PATIENCE = 60.0
"""Seconds after which a process counts as hanging."""
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def main(description: str | None, number: int, storm: Callable[[Path, int], Any], of: str = "kills") -> None:
    """The command line of a storm: `storm(folder, seed).rage(number)` gives the exit status. `of` names its option."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument(f"--{of}", type=int, default=number, dest="number")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(storm(Path(folder), options.seed).rage(options.number))


def write_experiment(folder: Path, **sections: Any) -> Path:
    """A tiny teacher, a corpus, and an experiment file with these and further `sections` and keys."""
    from conftest import passages, save_teacher

    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
    texts = passages(12)
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    content: dict[str, Any] = {
        "corpus": {"path": str(folder / "corpus.jsonl"), "sequence_length": 16, "held_out": 0.2},
        "teacher": {"model": str(save_teacher(folder / "teacher", texts)), "quantization": "none"},
        "student": {"options": {"layers": 1}},
        "run_dir": str(folder / "run"),
    }
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section} if isinstance(section, dict) else section
    (folder / "experiment.yaml").write_text(yaml.safe_dump(content))
    return folder / "experiment.yaml"


def distill_here(*arguments: str) -> int:
    """Run a command in this process, as a program of its own reports errors; its exit status."""
    from distill.cli import main

    sys.argv = ["distill", *arguments]
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    raise AssertionError("the command line ends with SystemExit")


class Children:
    """Processes that run commands and say what they say into a file."""

    def __init__(self, logs: Path, report: Callable[[str], None]) -> None:
        """`report` is told of a process that hangs."""
        self.logs, self.report = logs, report

    def start(self, name: str, *arguments: str) -> int:
        """The child that runs a command; `name` is that of its log."""
        # A signal between the fork and `try` would send the child back into the storm.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        child = os.fork()
        if child == 0:
            self._become(name, arguments)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return child

    def _become(self, name: str, arguments: tuple[str, ...]) -> None:
        from distill.system.interrupt import Interrupted

        status = 1
        try:
            words = os.open(self.logs / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(words, 1)
            os.dup2(words, 2)
            tqdm.set_lock(threading.RLock())  # the one of before is shared: killed with it, a child stops all others
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            status = distill_here(*arguments)
        except (KeyboardInterrupt, Interrupted):  # before the command was under way, or behind its end
            status = 130
        finally:
            sys.stdout.flush()
            os._exit(status)

    def wait(self, child: int) -> int:
        """A child's exit status; one that hangs is killed."""
        deadline = time.monotonic() + PATIENCE
        while not exited(child):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                self.report("a process hung")
            time.sleep(0.001)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def said(self, name: str) -> str:
        log = self.logs / f"{name}.log"
        return log.read_text(errors="replace") if log.exists() else ""  # it was killed before it said anything


def exited(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def send(signum: signal.Signals, child: int) -> None:
    """Send a signal to a child; one that kills has killed when this returns."""
    os.kill(child, signum)
    if signum == signal.SIGKILL:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
