"""Samples of a stream, window by window: as many as are needed, and later ones while the first are in use."""

from __future__ import annotations

import bisect
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distill.corpus.layout import LongDocuments
from distill.corpus.samples import Samples
from distill.corpus.summary import SourceCounts
from distill.errors import UserError

MARGIN = 1.25
"""Samples that a stream seems to have, for each that is asked for, so that its end is not looked for."""


@dataclass(frozen=True)
class Window:
    """One window of a stream as samples."""

    train: Samples
    held_out: Samples
    counts: SourceCounts
    shapes: dict[str, int]
    thoughts_left_out: int
    endless: int
    texts: Callable[[], Iterator[str]]
    """Function that reads the texts of its training documents."""


class Gathered(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The samples of one side of a stream, as `Samples` has them, behind one another."""

    def __init__(self, need: Callable[[int], None], sequence_length: int) -> None:
        """Begin without a sample; `need(count)` reads windows until there are so many."""
        self._need, self.sequence_length = need, sequence_length
        self._parts: list[Samples] = []
        self._ends: list[int] = []
        self._length: int | None = None
        self._documents = 0

    def add(self, samples: Samples) -> None:
        """Add the samples of the next window."""
        self._parts.append(samples)
        self._ends.append(self.ready + len(samples))

    def fix(self, length: int) -> None:
        """Let the set have this length from here on, whatever else is read."""
        self._length, self._documents = length, sum(part.documents for part in self._parts)

    @property
    def ready(self) -> int:
        """Number of samples that are made."""
        return self._ends[-1] if self._ends else 0

    @property
    def documents(self) -> int:
        """Number of documents that were read when the length was fixed."""
        return self._documents

    @property
    def long(self) -> LongDocuments:
        """Number of documents longer than a sample, of those that are read."""
        return LongDocuments.together(part.long for part in self._parts)

    def __len__(self) -> int:
        return self.ready if self._length is None else self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        self._need(index + 1)
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]


@dataclass
class Gatherer:
    """The reading of a stream's windows, on request or ahead in a thread."""

    take: Callable[[], Window | None]
    """Function that returns the next window, None behind the last one."""
    estimate: Callable[[int], float]
    """Function of the number of samples that were read: about how many the stream has at least."""
    name: str
    """The corpus's name in messages."""
    sequence_length: int
    windows: list[Window] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock, self._is_over = threading.Lock(), False
        self._error: Exception | None = None
        self._stop = threading.Event()
        self.train = Gathered(self._need_train, self.sequence_length)
        self.held_out = Gathered(lambda count: None, self.sequence_length)

    def gather(self, train: int | None, held_out: int, advance: Callable[[int], None]) -> None:
        """Read until there are enough samples to train on, or enough held out of a stream that surely has the others.

        None means all of the stream. From here on the numbers of samples are fixed. `advance` receives the number of
        training samples of each window.
        """
        while not self._is_enough(train, held_out) and self._more():
            advance(len(self.windows[-1].train))
        self.train.fix(self.train.ready if train is None or self._is_over else train)
        self.held_out.fix(self.held_out.ready)

    def _is_enough(self, train: int | None, held_out: int) -> bool:
        if train is None or not self.train.ready:
            return False
        if self.train.ready >= train:  # no further text is read to be held out
            return self.held_out.ready > 0 or not held_out
        return self.held_out.ready >= held_out and self.estimate(self.train.ready) >= MARGIN * train

    def _more(self) -> bool:
        window = None if self._is_over else self.take()
        if window is None:
            self._is_over = True
            return False
        self.train.add(window.train)
        self.held_out.add(window.held_out)
        self.windows.append(window)
        return True

    def _need_train(self, count: int) -> None:
        if self.train.ready >= count:
            return
        with self._lock:
            if self._error is not None:
                raise self._error
            while self.train.ready < count:
                if not self._more():
                    raise UserError(
                        f"{self.name}: has {self.train.ready:,} training samples, not {len(self.train):,}: give "
                        f"--cache.max_samples {self.train.ready}; everything so far is kept"
                    )

    @contextlib.contextmanager
    def ahead(self) -> Iterator[None]:
        """Read the windows that are still needed in a thread, inside."""
        thread = threading.Thread(target=self._read_ahead, name="corpus", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _read_ahead(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                if self.train.ready >= len(self.train) or self._error is not None:
                    return
                try:
                    if not self._more():
                        return  # the reader tells
                except Exception as error:
                    self._error = error
