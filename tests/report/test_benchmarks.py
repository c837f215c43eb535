"""Recovery: the share of the teacher's lead over guessing that a model has, of one benchmark and of several."""

from __future__ import annotations

from typing import Any

import pytest

from distill.report.benchmarks import mean_recovery, recovery


def scored(
    value: float, chance: float | None = 0.25, stderr: float | None = None, metric: str = "acc"
) -> dict[str, Any]:
    score = {"value": value} | ({} if stderr is None else {"stderr": stderr})
    return {"metric": metric, "metrics": {metric: score}} | ({} if chance is None else {"chance": chance})


def test_recovery() -> None:
    assert recovery(scored(0.4), scored(0.5)) == pytest.approx(0.6)
    assert recovery(scored(0.2), scored(0.5)) == pytest.approx(-0.2)
    assert recovery(scored(0.6, 0.0), scored(0.5, 0.0)) == pytest.approx(1.2)
    assert recovery(scored(0.3), scored(0.25)) is None and recovery(scored(0.3), scored(0.2)) is None


def test_a_teacher_within_two_standard_errors_of_guessing_has_nothing_to_recover() -> None:
    assert recovery(scored(0.3), scored(0.30, stderr=0.03)) is None
    assert recovery(scored(0.3), scored(0.35, stderr=0.03)) == pytest.approx(0.5)


def test_only_one_metric_with_a_chance_level_compares() -> None:
    assert recovery(scored(0.4, None), scored(0.5, None)) is None
    assert recovery(scored(0.4, metric="acc_norm"), scored(0.5)) is None
    assert recovery(None, scored(0.5)) is None and recovery(scored(0.4), None) is None
    assert recovery({**scored(0.4), "metrics": {}}, scored(0.5)) is None, "not finite, and so left out"


def test_of_several_the_margins_are_summed() -> None:
    teacher = {
        "one": scored(0.75),
        "two": scored(0.5, 0.0),
        "unclear": scored(0.3, stderr=0.1),
        "text": scored(9.0, None),
    }
    student = {"one": scored(0.5), "two": scored(0.1, 0.0), "unclear": scored(0.9), "text": scored(8.0, None)}
    found = mean_recovery({"teacher": teacher, "student": student}, "student")
    assert found is not None and (found.tasks, found.clear) == (3, 2)
    assert found.recovery == pytest.approx((0.25 + 0.1) / (0.5 + 0.5))
