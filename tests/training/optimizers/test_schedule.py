"""Learning rate schedules: a linear rise, a cosine or a plateau, and the end."""

from __future__ import annotations

from itertools import pairwise

import pytest

from distill.training.optimizers.schedule import Schedule


def curve(kind: str, total: int = 100, warmup: float = 0.1, decay: float = 0.2, final: float = 0.1) -> list[float]:
    schedule = Schedule(kind, total, warmup, decay, final)  # type: ignore[arg-type]
    return [schedule(step) for step in range(total + 1)]


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_the_warmup_rises_linearly_to_the_peak(kind: str) -> None:
    assert curve(kind)[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(curve(kind)) == 1


def test_cosine() -> None:
    rates = curve("cosine")
    assert rates[10] == 1 and rates[-1] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.55)  # half way
    assert all(after < before for before, after in pairwise(rates[10:]))
    drops = [before - after for before, after in pairwise(rates[10:])]
    assert drops[0] < drops[45] > drops[-1]  # flat at both ends


def test_warmup_stable_decay() -> None:
    rates = curve("wsd")
    assert rates[9:81] == [1] * 72
    assert rates[80:] == pytest.approx([1 - 0.9 * step / 20 for step in range(21)])


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize(("warmup", "decay"), [(0, 0), (0.5, 0.5), (1, 0), (0, 1)])
def test_short_trainings_learn_at_every_step(kind: str, total: int, warmup: float, decay: float) -> None:
    rates = curve(kind, total, warmup, decay)[:total]
    assert all(0.1 <= rate <= 1 for rate in rates)


def test_after_the_end_it_stays() -> None:
    for kind in ("cosine", "wsd"):
        assert Schedule(kind, 10, 0.1, 0.2, 0.1)(15) == pytest.approx(0.1)  # type: ignore[arg-type]
