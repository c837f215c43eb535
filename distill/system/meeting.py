"""The wait of several processes for one another: it says whom it waits for, and one signal ends it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from distill.errors import UserError, first_line

if TYPE_CHECKING:
    import lightning.pytorch as pl  # by statement it takes seconds

_SECONDS_OF_SILENCE = 3.0
_POLL_SECONDS = 0.2
_SECONDS_TO_STOP = 10.0
_SIGNALS = {number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None}


@contextlib.contextmanager
def meeting(trainer: pl.Trainer) -> Iterator[None]:
    """Watch over the work inside until all processes of the Trainer have met.

    torch waits for them in C++, where Python hears no signal. So a thread hears it, by the descriptor that the signal's
    C handler writes to, and ends the process, and those that it has started, with status 130. Raises UserError if the
    processes do not meet.
    """
    if trainer.world_size == 1:
        yield
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(trainer, ours), name="meeting", daemon=True)
    watch.start()
    try:
        yield
    except Exception as error:
        if dist.is_initialized() or not isinstance(error, dist.DistError):
            raise
        raise UserError(f"{_place(trainer)}: not all processes met there ({first_line(error)[:200]})") from None
    finally:
        signal.set_wakeup_fd(before)
        theirs.close()  # which ends the thread
        watch.join()
        ours.close()


def _watch(trainer: pl.Trainer, signals: socket.socket) -> None:
    begun, is_told = time.monotonic(), trainer.num_nodes == 1 or trainer.local_rank > 0
    while not dist.is_initialized():
        if select.select([signals], [], [], _POLL_SECONDS)[0]:
            received = signals.recv(64)
            if not received:
                return
            if _SIGNALS.intersection(received) and not dist.is_initialized():
                _end(trainer)
        if not is_told and time.monotonic() - begun > _SECONDS_OF_SILENCE:
            is_told = True
            print(
                f"waiting until all {trainer.num_nodes} machines (num_nodes) have met at {_place(trainer)}; "
                f"this is the one of NODE_RANK {trainer.node_rank}: start the same command on each of the others",
                flush=True,
            )


def _place(trainer: pl.Trainer) -> str:
    environment: Any = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
    return f"{environment.main_address}:{environment.main_port} (MASTER_ADDR, MASTER_PORT)"


def _end(trainer: pl.Trainer) -> None:
    """End this process and those that Lightning started here. One of these ends with status 0, as Lightning expects."""
    started: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
    for process in started:
        process.terminate()
    for process in started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_TO_STOP)
    if trainer.local_rank == 0:
        print(
            "\nstopped while waiting for the other processes; everything so far is kept, and the same command goes on",
            file=sys.stderr,
            flush=True,
        )
    os._exit(0 if trainer.local_rank else 130)
