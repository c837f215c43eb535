"""A speed stands in the headline only if several rounds, and two models of one shape, agree on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.evaluation.cost import ROUNDS, join_rounds
from distill.report.facts import RunFacts
from distill.report.numbers import SPACE
from distill.report.page import run_page
from distill.report.steadiness import about_rounds, number_of_rounds, spread, unsteady
from distill.report.verdict import verdict

Change = Callable[[dict[str, Any]], object]


def cost_of(**rates: list[float]) -> dict[str, Any]:
    """Costs of models that wrote at these rates in the rounds."""
    every = {}
    for model, values in rates.items():
        rounds = [{"prefill": {"1": 100.0}, "decode": {"1": value, "8": None}} for value in values]
        every[model] = join_rounds(rounds)
    return every


def test_rounds_are_joined_to_their_median() -> None:
    joined = join_rounds(
        [{"prefill": {"1": 5.0}, "decode": {"1": rate, "8": 9.0 if rate < 3 else None}} for rate in (1.0, 8.0, 2.0)]
    )
    assert joined["decode"] == {"1": 2.0, "8": None}, "a batch that did not fit once has no speed"
    assert joined["rounds"] == {"prefill": {"1": [5.0] * 3}, "decode": {"1": [1.0, 8.0, 2.0]}}
    assert ROUNDS >= 3, "of fewer rounds the median is no guard"


def test_steady_speeds() -> None:
    cost = cost_of(teacher=[10, 11, 10.5], student=[20, 21, 22], control=[21, 21, 22])
    assert unsteady(cost) == "" and number_of_rounds(cost) == 3 and spread(cost) == pytest.approx(0.1)
    said = about_rounds(cost).replace(SPACE, " ")
    assert said.startswith("Speeds are medians of 3 rounds") and "up to 10" in said and "unsteady" not in said


@pytest.mark.parametrize(
    ("cost", "reason"),
    [
        (cost_of(teacher=[10, 1, 10], student=[20, 20, 20]), "one round of the teacher was 10"),
        (cost_of(teacher=[10, 10, 10], student=[20, 20, 40]), "one round of the student was 2"),
        (cost_of(teacher=[10] * 3, student=[20] * 3, control=[40] * 3), "student and control are of one shape"),
        ({"teacher": {"decode": {"1": 5.0}}, "student": {"decode": {"1": 5.0}}}, "one round alone"),
    ],
)
def test_unsteady_speeds(cost: dict[str, Any], reason: str) -> None:
    assert reason in unsteady(cost).replace(SPACE, " ")


def unsteady_control(content: dict[str, Any]) -> None:
    for size in content["cost"]["control"]["decode"]:
        content["cost"]["control"]["decode"][size] *= 3


def slow_round(content: dict[str, Any]) -> None:
    content["cost"]["teacher"]["rounds"]["decode"]["1"][1] /= 30


def one_round(content: dict[str, Any]) -> None:
    for entry in content["cost"].values():
        del entry["rounds"]


@pytest.mark.parametrize("change", [unsteady_control, slow_round, one_round])
def test_an_unsteady_speed_is_in_the_table_but_not_in_the_headline(
    fake_run: Callable[..., Path], change: Change
) -> None:
    facts = RunFacts.read(fake_run(change=change))
    assert "generates" not in verdict(facts) and "generates" in verdict(RunFacts.read(fake_run()))
    assert any(section.id == "speed" for section in run_page(facts).sections)
