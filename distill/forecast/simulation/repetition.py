"""Shortcuts for work that a simulation would repeat: samples and chunks that are alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

from distill.forecast.simulation.tracker import Tracker
from distill.forecast.simulation.work import Work

T = TypeVar("T")


def first_two_alike(
    items: Iterable[T], tracker: Tracker, kind: Callable[[T], Hashable] = lambda item: None
) -> Iterator[T]:
    """Yield the first two of neighbouring items of one kind; count the work of the second for each further one.

    The work on an item must leave no more behind than the work on the second.
    """
    last: Hashable = object()
    times, work, left_out = 0, Counter[Work](), 0

    def add_what_is_left_out() -> None:  # once, since a batch may have a million items
        tracker.work.update({one: left_out * count for one, count in work.items()})

    for item in items:
        if kind(item) != last:
            add_what_is_left_out()
            last, times, left_out = kind(item), 0, 0
        if times == 2:
            left_out += 1
            continue
        before = Counter(tracker.work)
        yield item
        times, work = times + 1, tracker.work - before
    add_what_is_left_out()


class EachKindOnce:
    """A walk of a `ChunkedAdamW` over two whole chunks of each size of its parameters, and over their rests.

    Equal chunks allocate the same and free it again: the peak is that of one, the work that of all. An update of 1 B
    weights is 4,700 chunks of some 50 kernels each, which takes minutes if every kernel is watched.
    """

    def __init__(self, walk: Callable[[int], Iterable[slice]], tracker: Tracker) -> None:
        self.walk, self.tracker = walk, tracker
        self.seen: dict[int, Counter[Work]] = {}
        """Work for a parameter, by its size. It is cleared before each step, since the first one makes the moments."""

    def __call__(self, count: int) -> Iterator[slice]:
        work = self.tracker.work
        if count in self.seen:
            work.update(self.seen[count])
            return
        before = Counter(work)
        yield from first_two_alike(self.walk(count), self.tracker, lambda chunk: chunk.stop - chunk.start)
        self.seen[count] = work - before
