"""The program's first moments: a signal ends it quietly, whatever is being imported; `nohup` is heeded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
SWALLOWS = """
import os, time
try:
    os.kill(os.getpid(), {signum})
    time.sleep(1)
except BaseException:
    raise ImportError("half of a module") from None
"""
"""A module during whose import a signal comes, and that makes another error of whatever is raised in it."""


def start(folder: Path, module: str, signum: int, *prefix: str) -> subprocess.CompletedProcess[str]:
    """Run a command that meets this signal while it imports `module`."""
    (folder / f"{module}.py").write_text(SWALLOWS.format(signum=int(signum)))
    (folder / "a.yaml").write_text("corpus: {path: corpus.jsonl}\nteacher: {model: teacher}\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [*prefix, sys.executable, "-m", "distill", "run", "a.yaml"]
    return run(command, environment, folder)


def run(command: list[str], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that does not ignore signals, even if this test runs in the background of a script."""
    heed = {"preexec_fn": lambda: [signal.signal(each, signal.SIG_DFL) for each in SIGNALS]}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, **heed)


@pytest.mark.parametrize("signum", SIGNALS, ids=[each.name for each in SIGNALS])
@pytest.mark.parametrize("module", ["argparse", "yaml", "torch"])
def test_a_signal_while_the_program_is_imported_ends_it_quietly(
    tmp_path: Path, module: str, signum: signal.Signals
) -> None:
    """The first module is the command line's own, the second the experiment file's, the third the recipe's."""
    done = start(tmp_path, module, signum)
    assert (done.returncode, done.stderr) == (130, "\nstopped\n")
    assert len(done.stdout.splitlines()) == (module == "torch"), "a command says what it reads before it imports more"


def test_whoever_ignores_a_signal_keeps_ignoring_it(tmp_path: Path) -> None:
    """As `nohup` does for SIGHUP, and a shell for the Ctrl-C of what it starts in the background."""
    ignoring = ["sh", "-c", 'trap "" HUP INT; exec "$@"', "sh"]
    for signum in (signal.SIGHUP, signal.SIGINT):
        done = start(tmp_path, "argparse", signum, *ignoring)
        assert done.returncode == 1 and "stopped" not in done.stderr, done


def test_a_signal_behind_the_work_prints_no_traceback(tmp_path: Path) -> None:
    """Python's own end takes a moment: a function that it calls then is interrupted."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, time\natexit.register(lambda: (os.kill(os.getpid(), 2), time.sleep(1)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "distill", "--version"]
    done = run(command, environment, tmp_path)
    assert (done.returncode, done.stderr) == (130, "\nstopped\n")


def test_windows_itself_is_refused_with_what_to_do() -> None:
    code = "import sys; sys.platform = 'win32'; from distill.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "WSL2" in done.stderr and len(done.stderr.splitlines()) == 1
