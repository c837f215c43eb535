"""Child process in which a forecast simulates, so that nothing of it is left in the program that goes on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch
from tqdm import tqdm

_VISIBLE = "CUDA_VISIBLE_DEVICES"
P = ParamSpec("P")
T = TypeVar("T")


class Child(Generic[P, T]):
    """One process that answers calls of a function in turn, until it is closed.

    It is a fork, which has imported everything already. Where CUDA is, which does not survive a fork, or the system
    cannot fork, it starts from nothing and takes some seconds more. It sees no CUDA device, and ends with this process.
    """

    def __init__(self, function: Callable[P, T], method: str | None = None) -> None:
        can_fork = sys.platform == "linux" and not torch.cuda.is_available()
        context: Any = multiprocessing.get_context(method or ("fork" if can_fork else "spawn"))
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._connection, function), daemon=True)
        with _as_a_child_has_it():
            self._process.start()
        theirs.close()  # so that it is closed when the child ends
        self.close = weakref.finalize(self, _end, self._process, self._connection)
        """Ends the child, whatever it does."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the function there. Raises its error, or RuntimeError if the child was killed."""
        try:
            self._connection.send((args, kwargs))
            result, error = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise RuntimeError(f"its process ended with status {self._process.exitcode}") from None
        if error is not None:
            raise error
        return cast(T, result)


@contextlib.contextmanager
def _as_a_child_has_it() -> Iterator[None]:
    """Hide CUDA devices and Ctrl-C from a process started inside, before it imports anything.

    Ctrl-C reaches the parent too, which closes the child. What CUDA has in this process it has read already.
    """
    if sys.platform != "win32":
        # A spawn starts this helper of multiprocessing if it is not there, which would let Ctrl-C through again.
        resource_tracker.ensure_running()
    visible = os.environ.get(_VISIBLE)
    os.environ[_VISIBLE] = ""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]) if sys.platform != "win32" else []
    try:
        yield
    finally:
        os.environ.pop(_VISIBLE) if visible is None else os.environ.update({_VISIBLE: visible})
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _end(process: Any, connection: Connection) -> None:
    process.kill()
    process.join()
    connection.close()


def _serve(connection: Connection, parents: Connection, function: Callable[..., Any]) -> None:
    """Answer until the parent is gone."""
    parents.close()  # else it would never be closed
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    tqdm.set_lock(threading.RLock())  # the one of before is shared: killed while it holds it, a child stops the parent
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            args, kwargs = connection.recv()
            answer: tuple[Any, Exception | None]
            try:
                answer = function(*args, **kwargs), None
            except Exception as error:
                answer = None, error
            connection.send(answer)
