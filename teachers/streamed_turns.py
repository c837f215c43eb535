"""Several runs of a model's forward that go through its layers together, one of them under way at a time."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from contextlib import ExitStack

import torch


class _Stopped(Exception):
    """Raised in a run because another run failed."""


class Turns:
    """Several runs of a model's forward, of which one is under way at a time while the others wait at a layer.

    The forward is the family's own code, and only a waiting thread can stop it in the middle.
    """

    def __init__(self, runs: int, device: torch.device) -> None:
        self._gates = [threading.Semaphore(0) for _ in range(runs)]
        self._device = device
        self._mine = threading.local()
        self._error: BaseException | None = None

    def pause(self) -> None:
        """Let each of the other runs go on until it comes to a pause."""
        index: int = self._mine.index
        self._pass_on(index)
        self._gates[index].acquire()
        if self._error is not None:
            raise _Stopped

    def run(self, work: Callable[[int], None]) -> None:
        """Run `work(index)` for every run, in this thread's torch state. Raises the error of the first failure."""
        state = _state_of_torch(self._device)
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(self._one, work, index, state))
            for index in range(len(self._gates))
        ]
        for thread in threads:
            thread.start()
        self._gates[0].release()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # an interrupt; the runs end at their next pause
            self._error = error
            for thread in threads:
                thread.join()
        if self._error is not None:
            raise self._error

    def _one(self, work: Callable[[int], None], index: int, state: Callable[[], ExitStack]) -> None:
        self._mine.index = index
        self._gates[index].acquire()
        try:
            if self._error is None:
                with state():
                    work(index)
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._pass_on(index)

    def _pass_on(self, index: int) -> None:
        self._gates[(index + 1) % len(self._gates)].release()


def _state_of_torch(device: torch.device) -> Callable[[], ExitStack]:
    """Return a function that enters, in another thread, the state that torch keeps for each thread."""
    kind, inference, gradients = device.type, torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    autocast, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def enter() -> ExitStack:
        stack = ExitStack()
        if kind == "cuda":
            stack.enter_context(torch.cuda.device(device))
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(torch.autocast(kind, enabled=autocast, dtype=dtype))
        return stack

    return enter
