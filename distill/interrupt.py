"""Ctrl-C and SIGTERM: at once while nothing is at stake, at the end of the current batch while work is under way."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Interrupted(BaseException):
    """The user (or the machine) asked to stop. Not an Exception, so that nothing swallows it."""


_installed = False
_deferred = False
_asked = False


def _handle(signum: int, frame: FrameType | None) -> None:
    global _asked
    if _deferred and not _asked:
        _asked = True
        return
    raise Interrupted(signal.Signals(signum).name)


def install() -> None:
    """Take over Ctrl-C and SIGTERM for this process; none is waiting yet."""
    global _installed, _asked
    _installed, _asked = True, False
    signal.signal(signal.SIGINT, _handle)
    signal.signal(signal.SIGTERM, _handle)


def retake() -> None:
    """Take SIGTERM back from Lightning, which puts a handler of its own before ours: it ends the program with status 0
    wherever it next looks, for example in a measurement, before anything is saved."""
    if _installed:
        signal.signal(signal.SIGTERM, _handle)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, a first signal waits for `stop_if_asked`; a second one stops at once."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False


def asked() -> bool:
    """Whether a signal is waiting."""
    return _asked


def stop_if_asked() -> None:
    """Raise Interrupted when a signal is waiting."""
    if _asked:
        raise Interrupted("interrupted")
