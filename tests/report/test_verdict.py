"""The verdict says what was measured, and says it first when the student is no better than its control."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.report.facts import RunFacts
from distill.report.numbers import SPACE
from distill.report.verdict import verdict


@pytest.fixture
def said(fake_run: Callable[..., Path]) -> Callable[..., str]:
    """The verdict on a run whose evaluation was changed."""

    def say(change: Callable[[dict[str, Any]], object] | None = None) -> str:
        return verdict(RunFacts.read(fake_run(change=change))).replace(SPACE, " ")

    return say


def only(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in set(content) - set(keys):
            del content[key]

    return change


def test_all_that_was_measured(said: Callable[..., str]) -> None:
    assert said() == (
        "The student has 42 % of the teacher's parameters, keeps a KL of 3.17 nats/token from it over the student's "
        "tokens alone (control 3.46, difference −0.29, p = 0.0002) and generates 2.1× faster; on the 4 of 5 benchmarks "
        "where the teacher is clearly above chance, it recovers 38 % of that margin."
    )


@pytest.mark.parametrize("interval", [[-0.02, 0.04], [0.0, 0.04], [-0.02, 0.0], [float("nan"), 0.1]])
def test_no_better_when_the_interval_includes_nothing(said: Callable[..., str], interval: list[float]) -> None:
    test = {"difference": 0.012, "interval": interval, "p": 0.61}
    text = said(lambda content: content["student_against_control"].update(kl=test))
    assert text.startswith("The student is no better than the control, which learned from the text alone: KL from the")
    assert "3.17 against 3.46 nats/token, difference +0.012" in text and "p = 0.61" in text
    assert "; it has 42 % of the teacher's parameters and generates 2.1× faster;" in text


def test_no_better_when_p_does_not_say_so(said: Callable[..., str]) -> None:
    test = {"difference": -0.01, "p": 0.0625}  # four samples: no interval
    assert "no better than the control" in said(lambda content: content["student_against_control"].update(kl=test))


def test_worse(said: Callable[..., str]) -> None:
    test = {"difference": 0.3, "interval": [0.2, 0.4], "p": 0.001}
    text = said(lambda content: content["student_against_control"].update(kl=test))
    assert text.startswith("The student is worse than the control")


def test_without_a_test_the_values_decide(said: Callable[..., str]) -> None:
    assert said(only("fidelity")) == "The student keeps a KL of 3.17 nats/token from the teacher (control 3.46)."

    def worse(content: dict[str, Any]) -> None:
        only("fidelity")(content)
        content["fidelity"]["student"]["kl"] = 3.5

    assert said(worse).startswith("The student is no better than the control")


def test_without_control(said: Callable[..., str]) -> None:
    def change(content: dict[str, Any]) -> None:
        only("fidelity", "parameters")(content)
        del content["fidelity"]["control"]

    assert said(change) == (
        "The student has 42 % of the teacher's parameters and keeps a KL of 3.17 nats/token from it."
    )


def test_slower_and_out_of_memory(said: Callable[..., str]) -> None:
    def change(content: dict[str, Any]) -> None:
        only("cost")(content)
        del content["cost"]["control"]
        content["cost"]["teacher"]["decode"] = {"1": None, "8": 300.0}
        content["cost"]["student"]["decode"] = {"1": 50.0, "8": 150.0}

    assert said(change) == "The student generates 2.0× slower than the teacher."


def test_benchmarks_alone(said: Callable[..., str]) -> None:
    assert said(only("benchmarks")).startswith("On the 4 of 5 benchmarks where the teacher is clearly above chance")

    def at_chance(content: dict[str, Any]) -> None:
        only("benchmarks")(content)
        content["benchmarks"] = {model: {"winogrande": of["winogrande"]} for model, of in content["benchmarks"].items()}

    assert said(at_chance) == "On 1 benchmark the teacher itself is not clearly above chance."


def test_nothing_measured(said: Callable[..., str]) -> None:
    assert said(only("experiment")).startswith("Not measured yet")


def test_a_kl_over_the_whole_vocabulary_needs_no_words(said: Callable[..., str]) -> None:
    def whole(content: dict[str, Any]) -> None:
        del content["text"]["dropped_mass"]

    assert "from it (control 3.46" in said(whole)
