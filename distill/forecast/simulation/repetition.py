"""What a simulation would repeat without anything new: samples and chunks that are alike, a training's first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

import lightning.pytorch as pl
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from distill.forecast.phases import step
from distill.forecast.simulation.tracker import Tracker
from distill.forecast.simulation.work import Work
from distill.training.optimizers import chunked_adamw
from distill.training.optimizers.step_in_backward import StepInBackward

T = TypeVar("T")


def first_two_alike(
    items: Iterable[T], tracker: Tracker, kind: Callable[[T], Hashable] = lambda item: None
) -> Iterator[T]:
    """Of neighbouring items of one kind the first two; for each further one, the work of the second is counted.

    What is done with each must leave no more behind than what is done with the second.
    """
    last: Hashable = object()
    times, work = 0, Counter[Work]()
    for item in items:
        if kind(item) != last:
            last, times = kind(item), 0
        if times == 2:
            tracker.work.update(work)
            continue
        before = Counter(tracker.work)
        yield item
        times, work = times + 1, tracker.work - before


@contextmanager
def each_kind_of_chunk_once() -> Iterator[None]:
    """Inside, an optimiser that walks over its parameters chunk by chunk makes one whole chunk of each size of them.

    Equal chunks allocate the same and free it again: the peak is that of one, the work that of all. An update of 1 B
    weights is 4,700 chunks of some 50 kernels each, minutes where every kernel is watched. What a step before has done
    does not count: in the first one the moments are made, so that all sizes must be seen in the second.
    """
    seen: dict[int, list[Counter[Work]]] = {}

    def chunks(start: int, stop: int, size: int) -> Iterator[int]:
        """As `range`, which this hides in that module, but of equal chunks of equal parameters the first alone."""
        trackers = _trackers()
        if stop in seen:
            for tracker, known in zip(trackers, seen[stop], strict=True):
                tracker.work.update(known)
            return
        before = [Counter(tracker.work) for tracker in trackers]
        whole, rest = divmod(stop - start, size)
        if whole:
            yield start
            for tracker, earlier in zip(trackers, before, strict=True):
                for work, count in (tracker.work - earlier).items():
                    tracker.work[work] += count * (whole - 1)
        if rest:
            yield start + whole * size
        seen[stop] = [tracker.work - earlier for tracker, earlier in zip(trackers, before, strict=True)]

    forget = register_optimizer_step_pre_hook(lambda *_: seen.clear())
    try:
        with mock.patch.object(chunked_adamw, "range", chunks, create=True):
            yield
    finally:
        forget.remove()


@contextmanager
def work_of_update() -> Iterator[Counter[Work]]:
    """Gives what the last optimiser step inside did by itself: a step of more passes has one of it all the same."""
    found: Counter[Work] = Counter()
    before: dict[Tracker, Counter[Work]] = {}

    def begin(*_: Any) -> None:
        before.update({tracker: Counter(tracker.work) for tracker in _trackers()})

    def end(*_: Any) -> None:
        found.clear()
        for tracker in _trackers():
            found.update(tracker.work - before[tracker])

    hooks = [register_optimizer_step_pre_hook(begin), register_optimizer_step_post_hook(end)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def moments_made_first() -> Iterator[None]:
    """Inside, `simulate_step` makes one step instead of two: the optimiser has its states already, as after a first.

    They are made by an update with gradients out of nowhere, which is forgotten before the step begins.
    """

    def one_step(module: Any, batch: Any, precision: str, callbacks: list[pl.Callback]) -> None:
        run(module, batch, precision, [_MakeMoments(), *callbacks], steps=1)

    run = step.run_steps
    with mock.patch.object(step, "run_steps", one_step):
        yield


class _MakeMoments(pl.Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:
            own = optimizer.optimizer if isinstance(optimizer, StepInBackward) else optimizer
            weights = [weight for group in own.param_groups for weight in group["params"]]
            for weight in weights:
                weight.grad = torch.empty_like(weight)
            own.step()
            for weight in weights:
                weight.grad = None
        for tracker in _trackers():
            tracker.forget()


def _trackers() -> list[Tracker]:
    return [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Tracker)]
