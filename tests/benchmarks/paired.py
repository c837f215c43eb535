"""Two ways of doing the same work, side by side in one run: paired repeats, medians with spread, both kinds of time."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

LAUNCHER = """
import json, os, sys, time
begin = time.perf_counter()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, usage = os.wait4(child, 0)
wall = time.perf_counter() - begin
print(json.dumps([os.waitstatus_to_exitcode(status), wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024]))
"""
"""Program that runs a command and measures it. Started by a large process, the command itself would inherit that
process's peak memory."""


@dataclass(frozen=True)
class Setup:
    """Settings of every benchmark: the device, whether sizes are the tiny ones of a test, and repeats of each pair."""

    device: str = "cpu"
    tiny: bool = False
    repeats: int = 5
    case: str = ""
    """Part of the names of the cases that are wanted; empty: all of them."""

    def wants(self, case: str) -> bool:
        """Tell whether a case is to be measured."""
        return self.case in case


@dataclass(frozen=True)
class Cost:
    """One run's wall time and processor time (user and system, ended children among them) in seconds."""

    wall: float
    processor: float
    peak_bytes: int = 0
    """Largest resident memory; 0 where it was not measured."""


@dataclass(frozen=True)
class Row:
    """One line of the table: a ratio of ours to a peer's, or of theirs to ours where more is better."""

    bench: str
    case: str
    """Sizes and types: "bf16, D 576, V 49,152"."""
    measure: str
    """The quantity and the peer: "time of plain cross-entropy", "bytes a token of top-k 100"."""
    ours: str
    peer: str
    """Medians of both, with unit."""
    ratio: float | None
    low: float | None
    high: float | None
    """Median, smallest and largest of the pairs' ratios; None for a row that was not measured."""
    processor: float | None = None
    """The median ratio in processor time."""
    aim: str = ""
    """For example "≤ 0.65"; empty for a row that only tells."""

    @property
    def met(self) -> bool | None:
        """True if the aim is met, None if there is none or nothing was measured."""
        if not self.aim or self.ratio is None:
            return None
        sign, bound = self.aim.split()[:2]
        return self.ratio <= float(bound) if sign == "≤" else self.ratio >= float(bound)


@dataclass(frozen=True)
class Pairs:
    """Costs of both sides, pair by pair."""

    ours: list[Cost]
    peer: list[Cost]

    def time_row(self, bench: str, case: str, measure: str, aim: str = "") -> Row:
        """Return our time divided by the peer's: less is better."""
        return self._row(bench, case, measure, self.ours, self.peer, aim)

    def speed_row(self, bench: str, case: str, measure: str, aim: str = "") -> Row:
        """Return our speed divided by the peer's, of the same work: more is better."""
        return self._row(bench, case, measure, self.peer, self.ours, aim)

    def _row(self, bench: str, case: str, measure: str, above: list[Cost], below: list[Cost], aim: str) -> Row:
        ratios = [a.wall / b.wall for a, b in zip(above, below, strict=True)]
        processor = statistics.median(a.processor / b.processor for a, b in zip(above, below, strict=True))
        ours, peer = (f"{statistics.median(cost.wall for cost in side):.3g} s" for side in (self.ours, self.peer))
        return Row(bench, case, measure, ours, peer, *spread(ratios), processor, aim)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return median, smallest and largest."""
    return statistics.median(values), min(values), max(values)


def ratio_row(
    bench: str,
    case: str,
    measure: str,
    ours: Sequence[float],
    peer: Sequence[float],
    form: str = "{:.3g}",
    aim: str = "",
) -> Row:
    """Return ours divided by the peer's, of numbers that are no times; `form` prints one with its unit."""
    ratios = [mine / other for mine, other in zip(ours, peer, strict=True)]
    texts = (form.format(statistics.median(side)) for side in (ours, peer))
    return Row(bench, case, measure, *texts, *spread(ratios), aim=aim)


def number_row(
    bench: str, case: str, measure: str, ours: float, peer: float, form: str = "{:.3g}", aim: str = ""
) -> Row:
    """Return the row of two numbers that no repeat changes, such as bytes; `form` prints each with its unit."""
    return ratio_row(bench, case, measure, [ours], [peer], form, aim)


def not_measured(bench: str, case: str, measure: str, reason: str) -> Row:
    """Return the row of something that does not run here, with the reason."""
    return Row(bench, case, measure, "", reason, None, None, None)


def cpu_seconds() -> float:
    """Return the processor time of this process and its ended children so far: user and system."""
    return time.process_time() + sum(os.times()[2:4])


def cost(run: Callable[[], object], device: str = "cpu") -> Cost:
    """Run once and return the cost; a CUDA device's queue is empty before and after."""
    _wait(device)
    processor, begin = cpu_seconds(), time.perf_counter()
    run()
    _wait(device)
    return Cost(time.perf_counter() - begin, cpu_seconds() - processor)


def paired(ours: Callable[[], object], peer: Callable[[], object], setup: Setup) -> Pairs:
    """Run each once unmeasured, then `setup.repeats` pairs; who comes first alternates."""
    ours(), peer()
    found: Pairs = Pairs([], [])
    for repeat in range(setup.repeats):
        sides = [(ours, found.ours), (peer, found.peer)]
        for run, costs in sides if repeat % 2 == 0 else reversed(sides):
            gc.collect()
            costs.append(cost(run, setup.device))
    return found


def cost_apart(command: Sequence[str], environment: dict[str, str] | None = None, cwd: Path | None = None) -> Cost:
    """Run a command in a process of its own; its output is dropped, and shown when it fails."""
    line = [sys.executable, "-S", "-c", LAUNCHER, *command]
    done = subprocess.run(line, env={**os.environ, **(environment or {})}, cwd=cwd, capture_output=True, text=True)
    status, *found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else (1, 0, 0, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: exit status {status}\n{done.stdout}{done.stderr}")
    print(f"  {found[0]:.0f} s: {' '.join(Path(word).name for word in command[:4])}", file=sys.stderr, flush=True)
    return Cost(*found)


def allocator_peak(prepare: Callable[[], Callable[[], object]], device: str = "cpu") -> int:
    """Return the most bytes that torch's allocator held while what `prepare` returns ran, what it made among them.

    On a CPU the allocations are added up from the profiler's record, on a CUDA device they are its counter's.
    """
    gc.collect()
    if device == "cpu":
        return _profiled_peak(prepare)
    before = torch.cuda.memory_allocated()
    run = prepare()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def _profiled_peak(prepare: Callable[[], Callable[[], object]]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would log its every start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run = prepare()
        with record_function("prepared"):
            pass
        run()
    assert profiler.profiler is not None
    events: list[Any] = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    now = peak = 0
    for event in events:
        if event.name() == "prepared":
            peak = now
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
