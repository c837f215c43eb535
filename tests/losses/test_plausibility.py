"""A student too good to be true is told from an honest one."""

from __future__ import annotations

import pytest

from distill.losses.plausibility import implausible


@pytest.mark.parametrize(
    ("nll", "teacher_nll"),
    [
        (3.082, 4.320),  # trained on the One Billion Word Benchmark beside GPT-2, Radford et al. 2019
        (2.907, 3.624),  # WikiText-103
        (6.744, 3.784),  # the demo's student
        (0.02, 0.1),  # both nearly sure
        (2.0, 4.0),
        (float("inf"), 3.0),
        (float("nan"), 3.0),
    ],
)
def test_honest_students_are_left_alone(nll: float, teacher_nll: float) -> None:
    assert implausible("student", nll, teacher_nll) is None


@pytest.mark.parametrize(("nll", "teacher_nll"), [(0.0, 3.784), (1.2, 2.6), (0.01, 0.6)])
def test_a_perplexity_of_one_is_flagged(nll: float, teacher_nll: float) -> None:
    said = implausible("student", nll, teacher_nll)
    assert said is not None and "sees what it is to predict" in said and f"{nll:.3f}" in said
