"""Several processes that Lightning starts, each running the command anew: together to the end, with none left over."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from distill.errors import UserError
from distill.system import interrupt
from distill.system.meeting import meeting

if TYPE_CHECKING:
    import lightning.pytorch as pl  # by statement it takes seconds

_SECONDS_TO_STOP = 60.0
_SECONDS_TO_AGREE = 5.0
"""Seconds in which the process of rank 0 meets the same error as another, if all meet it. Then it alone reports."""
_SECONDS_TO_END = 3.0
"""Seconds that a process which failed alone may take from its report to its end; fewer than those to agree."""
_SET_BY_LIGHTNING = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextlib.contextmanager
def together(trainer: pl.Trainer) -> Iterator[None]:
    """Let every process of the Trainer do the work inside. A failure of one, or a request to stop, ends all.

    If it was stopped, or if all failed, the exception comes out in the process of rank 0 only; the others end here. If
    only one of the others fails, that one reports, and ends the process of rank 0 with its status.
    """
    with _processes_of_its_own(trainer):
        try:
            with meeting(trainer):
                yield
        except interrupt.Interrupted:
            leave_if_not_first(trainer)
            raise
        except Exception as error:
            if trainer.global_rank > 0:
                _wait_until(interrupt.asked, _SECONDS_TO_AGREE)
            elif not isinstance(error, UserError) or error.__cause__ is not None:  # code of the user's that waited, say
                _end_with_the_one_that_failed(trainer)
            # If the others ended first on request, the connection to them is lost, and that is the error here.
            if not interrupt.asked():
                raise
            leave_if_not_first(trainer)
            raise interrupt.Interrupted("interrupted") from None


def leave_if_not_first(trainer: pl.Trainer) -> None:
    """End this process with status 0, unless its rank is 0.

    Any other status would make Lightning kill the process of rank 0, which is the one that reports to the user.
    """
    if trainer.global_rank > 0:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # this process is ending already
        sys.exit(0)


@contextlib.contextmanager
def _processes_of_its_own(trainer: pl.Trainer) -> Iterator[None]:
    """End every process that Lightning started, in any case, so that the next Trainer starts from scratch."""
    before = {name: os.environ.get(name) for name in _SET_BY_LIGHTNING}
    try:
        yield
    except BaseException:
        for process in _started(trainer):
            process.send_signal(signal.SIGTERM)
        raise
    finally:
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        _wait_for(_started(trainer))
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _end_with_the_one_that_failed(trainer: pl.Trainer) -> None:
    """End with the status of the one process that failed alone: it has reported, and the connection to it is lost."""

    def statuses() -> list[int]:
        return [process.returncode for process in _started(trainer) if process.poll()]

    _wait_until(lambda: bool(statuses()), _SECONDS_TO_END)
    for status in statuses():
        if status < 0:
            raise UserError(f"the process of another device was killed (signal {-status})") from None
        raise SystemExit(status) from None


def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def _started(trainer: pl.Trainer) -> list[subprocess.Popen[bytes]]:
    return getattr(trainer.strategy.launcher, "procs", [])


def _wait_for(started: list[subprocess.Popen[bytes]]) -> None:
    """Wait for the processes. Those that do not end are killed, which costs the batch in work."""
    for process in started:
        try:
            process.wait(_SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
