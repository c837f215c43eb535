"""A child answers as the function would, leaves nothing behind, and ends with what asked for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from distill.errors import UserError
from distill.forecast.child import Child

LEFT: list[int] = []


def answer(question: str) -> tuple[str, int, bool]:
    """Return what there is, and leave something behind."""
    if question == "wrong":
        raise UserError("train.optimizer: no such optimiser")
    if question == "end":
        os.kill(os.getpid(), signal.SIGKILL)
    LEFT.append(1)
    return question, len(LEFT), torch.cuda.is_available()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_it_answers_in_turn_and_leaves_nothing(method: str) -> None:
    child = Child(answer, method)
    assert [child("a"), child(question="b")] == [("a", 1, False), ("b", 2, False)]
    assert LEFT == []
    with pytest.raises(UserError, match="no such optimiser"):
        child("wrong")
    assert child("c") == ("c", 3, False)
    child.close()


def test_one_that_was_killed_is_told() -> None:
    child = Child(answer)
    with pytest.raises(RuntimeError, match="its process ended with status -9"):
        child("end")
    child.close()


PROGRAM = """
import sys, time
from distill.forecast.child import Child
from distill.system import interrupt

interrupt.install()
child = Child(time.sleep, {method!r})
child(0)
try:
    print("begun", flush=True)
    child({seconds})
    time.sleep(60)
except interrupt.Interrupted:
    child.close()
    sys.exit(7)
"""


BLOCKED = """
import signal
from distill.forecast.child import Child

print(signal.SIGINT in Child(signal.pthread_sigmask, {method!r})(signal.SIG_BLOCK, []))
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_first_child_of_a_program_never_hears_ctrl_c(method: str) -> None:
    command = [sys.executable, "-c", BLOCKED.format(method=method)]
    assert subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout == "True\n"


@pytest.mark.parametrize(
    ("signum", "seconds", "method"),
    [
        (signal.SIGINT, 60, "fork"),
        (signal.SIGINT, 60, "spawn"),
        (signal.SIGTERM, 60, "fork"),
        (signal.SIGKILL, 0, "fork"),
    ],
)
def test_however_the_program_is_stopped_its_child_ends(signum: signal.Signals, seconds: float, method: str) -> None:
    """Ctrl-C reaches both, as in a terminal; nothing is printed."""
    command = [sys.executable, "-c", PROGRAM.format(seconds=seconds, method=method)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as program:
        assert program.stdout is not None and program.stderr is not None
        assert program.stdout.readline() == b"begun\n"
        (os.killpg if signum == signal.SIGINT else os.kill)(program.pid, signum)
        assert program.stderr.read() == b""  # which ends when both have ended
        assert program.wait() == (-signal.SIGKILL if signum == signal.SIGKILL else 7)
