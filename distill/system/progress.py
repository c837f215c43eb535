"""Progress of long work: a bar in a terminal, a line that changes in a notebook, else a log line now and then."""

from __future__ import annotations

import re
import sys
import time
from types import TracebackType
from typing import Any

from distill.system.units import duration

LINE_SECONDS = 15.0
"""Seconds between two log lines if there is no terminal."""
CELL_SECONDS = 1.0
"""Seconds between two changes of the line in a notebook's cell."""


_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")

_is_quiet = False


def be_quiet() -> None:
    """Say nothing and show nothing from now on. Of several processes that do the same, one speaks."""
    global _is_quiet
    _is_quiet = True


def visible(text: str) -> str:
    """Return a text with what would steer a terminal written out, such as `\\x1b`; tabs and ends of lines stay.

    These are control characters, and the characters that turn the direction of a text or end its line.
    """
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


def say(message: str, *, by_any: bool = False) -> None:
    """Print a line for the person at the terminal or the reader of the log, `by_any` process if only that one knows."""
    if by_any or not _is_quiet:
        print(visible(message), flush=True)


class Progress:
    """A display of `done` of `total` units with rate, remaining time and the latest values; a context manager."""

    def __init__(self, title: str, total: int, unit: str, done: int = 0) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = self._start_done = done
        self._values = ""
        self._started = self._last_line = time.monotonic()
        self._bar = self._make_bar() if sys.stdout.isatty() and not _is_quiet else None
        self._in_cell = not self._bar and not _is_quiet and _is_a_notebook()
        self._cell: Any = None  # the cell's output, once there is one

    def _make_bar(self):  # type: ignore[no-untyped-def]  # rich is imported only where there is a terminal
        from rich import progress

        bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]} {task.fields[unit]}/s"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[values]}"),
        )
        self._task = bar.add_task(
            self.title, total=self.total, completed=self.done, unit=self.unit, values="", rate="-"
        )
        return bar

    def start(self, done: int) -> None:
        """Start the count here: earlier work (loading, earlier runs) is not part of the rate."""
        self.done = self._start_done = done
        self._started = self._last_line = time.monotonic()
        if self._bar:
            self._bar.reset(self._task, total=self.total, completed=done)

    def __enter__(self) -> Progress:
        self.start(self.done)
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif self.done > self._start_done:
            self._line()

    def advance(self, amount: int, **values: object) -> None:
        """Advance by `amount` units. `values` are shown beside them."""
        self.done += amount
        self._values = "  ".join(f"{name} {value}" for name, value in values.items())
        if self._bar:
            self._bar.update(self._task, completed=self.done, values=self._values, rate=_shown(self.rate()))
        elif time.monotonic() - self._last_line >= (CELL_SECONDS if self._in_cell else LINE_SECONDS):
            self._line()

    def rate(self) -> float:
        """Return units a second since the start."""
        return (self.done - self._start_done) / max(time.monotonic() - self._started, 1e-9)

    def _line(self) -> None:
        self._last_line = time.monotonic()
        rate = self.rate()
        left = duration((self.total - self.done) / rate) if rate else "?"
        share = 100 * self.done // max(self.total, 1)
        line = (
            f"{self.title}: {self.done:,} of {self.total:,} {self.unit} ({share} %), "
            f"{_shown(rate)} {self.unit}/s, {left} left  {self._values}".rstrip()
        )
        if not self._in_cell:
            say(line)
        elif self._cell is None:
            self._cell = _shown_in_cell(line)
        else:
            self._cell.update({"text/plain": visible(line)}, raw=True)


def _is_a_notebook() -> bool:
    """Tell whether this program is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def _shown_in_cell(line: str) -> Any:
    """Show a line as an output of its own in the cell, and return its handle, which changes it in place."""
    from IPython.display import display

    return display({"text/plain": visible(line)}, raw=True, display_id=True)


def _shown(rate: float) -> str:
    """Write a rate with two decimals below ten, because steps of a large student take seconds."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}"
