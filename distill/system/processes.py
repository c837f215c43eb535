"""Several processes that Lightning starts, each running the command anew: together to the end, and none left over."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from distill.errors import UserError
from distill.system import interrupt

_SECONDS_TO_STOP = 60.0
_SECONDS_TO_AGREE = 5.0
"""In which the process of rank 0 meets what another one met, if all meet it: then it alone tells."""
_SET_BY_LIGHTNING = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_first_process() -> bool:
    """Whether this process has rank 0, as far as is known before there is a Trainer."""
    return getattr(rank_zero_only, "rank", 0) == 0 and int(os.environ.get("NODE_RANK", "0")) == 0


def run_together(trainer: pl.Trainer, work: Callable[[], None]) -> None:
    """`work` in every process of the Trainer. A failure of one, or a stop that was asked for, ends all.

    When it was stopped, or all failed, it returns (with the exception) in the process of rank 0 only; the others end
    here. A failure of one of the others is told by that one, and ends the process of rank 0 with its status.
    """
    with _processes_of_its_own(trainer):
        try:
            work()
        except interrupt.Interrupted:
            leave_if_not_first(trainer)
            raise
        except Exception as error:
            if trainer.global_rank > 0:
                _wait_until(interrupt.asked, _SECONDS_TO_AGREE)
            elif not isinstance(error, UserError):
                _end_with_the_one_that_failed(trainer)
            # Where the others ended first, because they were asked to, the connection to them is lost.
            if not interrupt.asked():
                raise
            leave_if_not_first(trainer)
            raise interrupt.Interrupted("interrupted") from None


def leave_if_not_first(trainer: pl.Trainer) -> None:
    """Any other status would make Lightning kill the process of rank 0, which is the one that tells the user."""
    if trainer.global_rank > 0:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # it is ending already
        sys.exit(0)


@contextlib.contextmanager
def _processes_of_its_own(trainer: pl.Trainer) -> Iterator[None]:
    """However it ends, no process that Lightning started outlasts it, and the next Trainer starts from scratch."""
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
    """Where a process that this one started failed alone, it has said why, and the connection to it is lost."""

    def statuses() -> list[int]:
        return [process.returncode for process in _started(trainer) if process.poll()]

    _wait_until(lambda: bool(statuses()), seconds=1.0)
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
    """What does not end is killed, which costs the shard in flight."""
    for process in started:
        try:
            process.wait(_SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
