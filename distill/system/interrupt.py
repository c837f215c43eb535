"""Ctrl-C, SIGTERM, SIGHUP, SLURM's SIGUSR1: they stop idle programs at once, working ones at a batch's end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Interrupted(BaseException):
    """Raised when the user (or the machine) asked to stop. It is no Exception, so that nothing swallows it."""


_installed = False
_deferred = False
_received: set[int] = set()
"""Signals that wait. The first of each kind waits, the second stops at once. The kinds are counted apart because a
process may be sent SIGTERM because of the same Ctrl-C that reached it already.
"""
_requeue = False
_SECONDS_TO_LEAVE = 0.05
"""Time in which a destructor has surely ended."""


def _handle(signum: int, frame: FrameType | None) -> None:
    global _requeue
    _requeue = _requeue or signal.Signals(signum).name == "SIGUSR1"
    if _deferred and signum not in _received:
        _received.add(signum)
        return
    raise Interrupted(signal.Signals(signum).name)


def _send_again(lost: Any) -> None:
    """Send a signal again whose exception Python would print and drop, as it does in destructors and callbacks."""
    name = str(lost.exc_value)
    if not isinstance(lost.exc_value, Interrupted) or name not in signal.Signals.__members__:
        sys.__unraisablehook__(lost)
        return
    number = signal.Signals[name]

    def send() -> None:
        if signal.getsignal(number) is _handle:
            os.kill(os.getpid(), number)

    again = threading.Timer(_SECONDS_TO_LEAVE, send)
    again.daemon = True
    again.start()


def install() -> None:
    """Take over Ctrl-C, SIGTERM and SIGHUP, in a job of SLURM also SIGUSR1, and forget signals that wait."""
    from distill.system import slurm  # here, because `distill --help` imports this file

    global _installed, _requeue
    _installed, _requeue = True, False
    _received.clear()
    sys.unraisablehook = _send_again
    signal.signal(signal.SIGINT, _handle)
    signal.signal(signal.SIGTERM, _handle)
    # Whoever started the program with `nohup` does not want it to end with the terminal.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _handle)
    if slurm.is_a_job():
        signal.signal(signal.SIGUSR1, _handle)


@contextlib.contextmanager
def taken_over() -> Iterator[None]:
    """Take signals over inside, and give them back at the end, for a program that goes on after the work.

    A stop comes out as KeyboardInterrupt, as Python's own does. A thread other than the main one gets no signals.
    """
    global _installed
    is_main = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
    before, hook = {number: signal.getsignal(number) for number in numbers}, sys.unraisablehook
    try:
        if is_main:
            install()
        yield
    except Interrupted as stop:
        raise KeyboardInterrupt(f"stopped ({stop}); everything so far is kept, and the same call goes on") from None
    finally:
        if is_main:
            _installed, sys.unraisablehook = False, hook
            _received.clear()
            for number, handler in before.items():
                if handler is not None:  # None is a handler that Python did not set, nor did we
                    signal.signal(number, handler)


def requeue_asked() -> bool:
    """Return whether a SIGUSR1 came, which asks to stop and to be queued again."""
    return _requeue


def retake() -> None:
    """Take SIGTERM back from Lightning, which puts a handler of its own before ours.

    Lightning's ends the program with status 0 at its next check, for example in a measurement, before anything is
    saved.
    """
    if _installed:
        signal.signal(signal.SIGTERM, _handle)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let a first signal inside wait for `stop_if_asked`. A second one of its kind stops at once."""
    global _deferred
    before, _deferred = _deferred, True
    try:
        yield
    finally:
        _deferred = before


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Hold a signal back to the end of work that an exception in the middle would spoil, then raise it.

    It is raised even if a second signal, which stops at once, came out as another error.
    """
    try:
        with deferred():
            yield
    finally:
        stop_if_asked()


def asked() -> bool:
    """Tell whether a signal is waiting."""
    return bool(_received)


def stop_if_asked() -> None:
    """Raise Interrupted if a signal is waiting."""
    if asked():
        raise Interrupted("interrupted")
