"""A calibration finds the speed of a machine from the times of work, and forecasts that work as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.forecast.machine import measuring
from distill.forecast.machine.calibration import DEFAULTS, Efficiency, speed
from distill.forecast.machine.cards import Card, find_card, this_machine
from distill.forecast.machine.measuring import Timed, calibrate, fit
from distill.forecast.simulation.work import Work

TINY = Counter({Work(None, 0, 2_000): 1500, Work(torch.float32, 10**5, 10**4): 200})
LARGE = Counter({Work(torch.bfloat16, 10**11, 10**7): 60, Work(None, 0, 10**8): 400, Work(None, 0, 100): 300})
LARGER = Counter({Work(None, 0, 10**9): 100, Work(torch.float32, 10**10, 10**8): 3})


@pytest.mark.parametrize("card", [this_machine("cpu"), find_card("rtx-3060")], ids=["cpu", "card"])
@pytest.mark.parametrize(("launch", "bandwidth"), [(3e-6, 0.9), (4e-5, 0.1)])
def test_the_speed_that_made_the_times_is_found(card: Card, launch: float, bandwidth: float) -> None:
    default = DEFAULTS["cuda" if card.is_cuda else "cpu"]
    truth = speed(card, replace(default, launch=launch, bandwidth=bandwidth))
    tiny, *others = (Timed(work, truth.seconds(work)) for work in (TINY, LARGE, LARGER))
    found = fit(card, default, tiny, others)
    assert (found.launch, found.bandwidth) == (pytest.approx(launch, rel=1e-3), pytest.approx(bandwidth, rel=1e-3))


class Ticks:
    """A clock that is a tick later at every look at it."""

    def __init__(self, tick: float) -> None:
        self.tick, self.time = tick, 0.0

    def __call__(self) -> float:
        self.time += self.tick
        return self.time


def test_a_calibration_is_the_fit_of_what_was_timed(
    one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By this clock every piece of work takes a fiftieth of a second."""
    seen: list[tuple[Timed, Sequence[Timed], Efficiency]] = []

    def remembered(card: Card, efficiency: Efficiency, tiny: Timed, others: Sequence[Timed]) -> Efficiency:
        seen.append((tiny, others, fit(card, efficiency, tiny, others)))
        return seen[0][2]

    monkeypatch.setattr(measuring, "fit", remembered)
    monkeypatch.setitem(measuring._LARGER, "cpu", measuring._TINY)
    monkeypatch.setattr(measuring, "_RUNS", 2)
    found = calibrate("cpu", Ticks(0.02), tmp_path)
    ((tiny, others, fitted),) = seen
    assert [timed.seconds for timed in (tiny, *others)] == pytest.approx([0.02] * 3)
    assert found.is_measured and found.reading > 0 and list(tmp_path.iterdir()) == []
    assert replace(found, reading=fitted.reading, is_measured=False) == fitted
    assert speed(this_machine("cpu"), found).seconds(tiny.work) == pytest.approx(0.02, rel=1e-3)


def test_a_run_is_timed_by_its_best_series() -> None:
    pace: Any = measuring._Pace("cpu", Ticks(2.0))
    assert pace.seconds(lambda: None) == 2.0  # one run a series, for a run takes longer than the budget
