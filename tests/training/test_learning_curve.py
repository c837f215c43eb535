"""The learning curve finds the law that its points follow, and its interval grows with what it does not know."""

from __future__ import annotations

import math

import pytest

from distill.training.learning_curve import LearningCurve, Place, places
from distill.training.optimizers.schedule import Schedule

STEPS = 1000
AFTER = places(Schedule("cosine", STEPS, 0.05, 0.2, 0.1), STEPS)
SHARES = (0, 5, 10, 20, 30, 45, 70, 100, 150, 220, 350, 500)


def law(place: Place, alpha: float = 0.3, s0: float = 8.0, gamma: float = 0.2) -> float:
    return 6.0 * (place.work + s0) ** -alpha * math.exp(-gamma * place.decay)


def test_places_add_up_the_rates_and_lose_nothing_before_the_peak() -> None:
    assert AFTER[0] == Place(0.0, 0.0) and len(AFTER) == STEPS + 1
    assert AFTER[50].decay == 0 and AFTER[50].work == pytest.approx(sum(step / 50 for step in range(1, 51)))
    assert AFTER[-1].decay == pytest.approx(0.9, abs=0.01)


def test_the_schedule_of_a_longer_training_is_the_same_stretched() -> None:
    longer = places(Schedule("cosine", 3 * STEPS, 0.05, 0.2, 0.1), 3 * STEPS)[-1]
    assert longer.work == pytest.approx(3 * AFTER[-1].work, rel=2e-3)
    assert longer.decay == pytest.approx(AFTER[-1].decay, abs=2e-3)


@pytest.mark.parametrize(("alpha", "s0", "gamma"), [(0.3, 8.0, 0.2), (0.15, 3.0, 0.1), (0.4, 20.0, 0.15)])
def test_points_of_half_a_training_tell_its_end(alpha: float, s0: float, gamma: float) -> None:
    curve = LearningCurve({AFTER[step]: law(AFTER[step], alpha, s0, gamma) for step in SHARES})
    assert curve.at(AFTER[-1]).kl == pytest.approx(law(AFTER[-1], alpha, s0, gamma), rel=0.04)


def test_the_interval_holds_the_truth_and_narrows_with_points() -> None:
    widths = []
    for seen in (7, 9, 12):
        end = LearningCurve({AFTER[step]: law(AFTER[step]) for step in SHARES[:seen]}).at(AFTER[-1])
        assert end.low < law(AFTER[-1]) < end.high
        widths.append(end.high / end.low)
    assert widths[0] > widths[1] > widths[2]


def test_a_further_place_is_less_certain() -> None:
    curve = LearningCurve({AFTER[step]: law(AFTER[step]) for step in SHARES})
    near, far = (curve.at(Place(AFTER[-1].work * factor, AFTER[-1].decay)) for factor in (1, 10))
    assert far.kl < near.kl and far.high / far.low > near.high / near.low


def test_a_kl_of_nothing_takes_no_part() -> None:
    points = {AFTER[step]: law(AFTER[step]) for step in SHARES}
    with_odd = {**points, AFTER[11]: 0.0, AFTER[12]: math.nan, AFTER[13]: -0.1}
    assert LearningCurve(with_odd).at(AFTER[-1]) == LearningCurve(points).at(AFTER[-1])
