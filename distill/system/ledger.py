"""The cost of each phase: time, memory and energy, one line an invocation in the run's `costs.jsonl`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from distill.system import json_lines
from distill.system.energy import measure_energy
from distill.system.interrupt import Interrupted
from distill.system.memory import peak_memory, reset_peak_memory
from distill.system.progress import say
from distill.system.rank import is_first_process

FILE = "costs.jsonl"
_LIMIT = 64 << 20

Meter = Callable[[], Callable[[], dict[str, Any]]]
"""Function that starts a measurement. Its result ends the measurement, and returns the fields of the line."""


@contextlib.contextmanager
def phase(run: Path, name: str, meters: Sequence[Meter] | None = None) -> Iterator[None]:
    """Note the cost of the work inside, however it ends. In processes other than the first it does nothing.

    The line has `phase`, `began` (UTC), `seconds`, `ended` (done, interrupted, failed), and if known
    `peak_memory_bytes` (the most that this process held; on macOS since it began), `peak_device_bytes` (the most that
    torch held on one CUDA card), `joules` and `energy_source`. It does not include the memory of other processes: those
    of other devices and those that load data. A killed process leaves no line. Phases may be nested.
    """
    if not is_first_process():
        yield
        return
    began, start = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.monotonic()
    ends = [begin() for begin in (METERS if meters is None else meters)]
    ended = "failed"
    try:
        yield
        ended = "done"
    except (Interrupted, KeyboardInterrupt):
        ended = "interrupted"
        raise
    finally:
        line = {"phase": name, "began": began, "seconds": round(time.monotonic() - start, 3), "ended": ended}
        for end in ends:
            with contextlib.suppress(Exception):  # a failed card cannot be asked, and must not hide the first error
                line |= end()
        try:
            append(run, line)
        except OSError as error:  # the work counts more than its line
            say(f"{run / FILE}: what {name} cost could not be noted ({error.strerror or error})")


def append(run: Path, line: dict[str, Any]) -> None:
    """Add a line to a run's file."""
    json_lines.append(run / FILE, line)


def read(run: Path) -> list[dict[str, Any]]:
    """Return all lines of a run, oldest first, or none if there is no file. Raises OSError if it cannot be read."""
    return json_lines.read(run / FILE, _LIMIT)


_open: list[dict[str, int]] = []
"""Peaks of the phases under way, from before the newest of them reset the system's own."""


def measure_memory() -> Callable[[], dict[str, Any]]:
    """Measure the peaks of this process: resident set, and torch's allocator on the CUDA card that has the highest."""
    for peaks in _open:
        _raise(peaks)
    mine: dict[str, int] = {}
    _open.append(mine)
    reset_peak_memory()
    if cuda := _cuda():
        for card in range(cuda.device_count()):
            cuda.reset_peak_memory_stats(card)

    def end() -> dict[str, Any]:
        _open[:] = [peaks for peaks in _open if peaks is not mine]
        _raise(mine)
        return mine

    return end


def _raise(peaks: dict[str, int]) -> None:
    """Raise the peaks to those of now, where they are higher."""
    now = {"peak_memory_bytes": peak_memory()}
    if cuda := _cuda():
        now["peak_device_bytes"] = max(cuda.max_memory_allocated(card) for card in range(cuda.device_count()))
    for key, value in now.items():
        if value is not None:
            peaks[key] = max(peaks.get(key, 0), value)


def _cuda() -> Any:
    """Return `torch.cuda` if it is in use. The question itself must not load or initialise it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None


METERS: tuple[Meter, ...] = (measure_energy, measure_memory)
