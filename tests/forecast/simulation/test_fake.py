"""The world without memory is left as it was found, whenever the user asks to stop."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from distill.forecast.phases.step import StepShape, simulate_step
from distill.forecast.simulation.fake import without_memory
from distill.system import interrupt


@pytest.fixture(autouse=True)
def taken_over() -> Any:
    """Ctrl-C and SIGTERM as a command has them."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    interrupt.install()
    yield
    interrupt.install()
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_a_signal_is_raised_when_the_fake_tensors_are_gone() -> None:
    with pytest.raises(interrupt.Interrupted), without_memory("cpu"):
        os.kill(os.getpid(), signal.SIGTERM)
        assert torch.ones(2, 2).matmul(torch.ones(2, 2)).shape == (2, 2)
    assert torch.ones(2).sum().item() == 2


def test_a_signal_is_not_lost_in_the_error_that_a_second_one_became() -> None:
    with pytest.raises(interrupt.Interrupted), without_memory("cpu"):
        os.kill(os.getpid(), signal.SIGINT)
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except interrupt.Interrupted as stop:
            raise AssertionError("False, True") from stop


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_step_that_is_stopped_at_any_instant_says_so(maker: Callable[..., Any], signum: signal.Signals) -> None:
    """Lightning has a handler for SIGTERM of its own while it trains, or believes to."""
    shape = StepShape(samples=4, length=8)
    began = time.monotonic()
    undisturbed = simulate_step(maker(), shape)
    duration, instants = time.monotonic() - began, random.Random(0)
    for _ in range(6):
        interrupt.install()
        sender = threading.Timer(instants.uniform(0, 0.8 * duration), os.kill, (os.getpid(), signum))
        sender.start()
        with pytest.raises(interrupt.Interrupted):
            simulate_step(maker(), shape)
            sender.join()  # it was quicker than the first
        sender.join()
    interrupt.install()
    assert simulate_step(maker(), shape) == undisturbed
