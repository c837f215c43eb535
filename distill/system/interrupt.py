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
_received: set[int] = set()
"""Signals that wait. One of each kind is one wish to stop: a process may be sent SIGTERM because of the Ctrl-C that
reached it too. The second of a kind is impatience."""


def _handle(signum: int, frame: FrameType | None) -> None:
    if _deferred and signum not in _received:
        _received.add(signum)
        return
    raise Interrupted(signal.Signals(signum).name)


def install() -> None:
    """Take over Ctrl-C and SIGTERM for this process; none is waiting yet."""
    global _installed
    _installed = True
    _received.clear()
    signal.signal(signal.SIGINT, _handle)
    signal.signal(signal.SIGTERM, _handle)


def retake() -> None:
    """Take SIGTERM back from Lightning, which puts a handler of its own before ours: it ends the program with status 0
    wherever it next looks, for example in a measurement, before anything is saved."""
    if _installed:
        signal.signal(signal.SIGTERM, _handle)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, a first signal waits for `stop_if_asked`; a second one of its kind stops at once."""
    global _deferred
    before, _deferred = _deferred, True
    try:
        yield
    finally:
        _deferred = before


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """For work that an exception out of nowhere would spoil: a signal that came inside is raised at the end, even
    where a second one (which stops at once) came out as another error."""
    try:
        with deferred():
            yield
    finally:
        stop_if_asked()


def asked() -> bool:
    """Whether a signal is waiting."""
    return bool(_received)


def stop_if_asked() -> None:
    """Raise Interrupted when a signal is waiting."""
    if asked():
        raise Interrupted("interrupted")
