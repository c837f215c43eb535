"""The spread of speeds over several rounds, and the reason why they are too unsteady for a headline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distill.report.numbers import share, times

STEADY = 1.25
"""Largest ratio of a model's fastest round to its slowest, and of student to control, that may stand in a headline."""
PHASES = ("prefill", "decode")


def number_of_rounds(cost: Mapping[str, Any]) -> int:
    """Return the number of rounds behind each speed; 0 if only one number is known."""
    return max((len(rates) for *_, rates in _rounds(cost)), default=0)


def spread(cost: Mapping[str, Any]) -> float:
    """Return the largest difference between two rounds of a model, as a share of the slower one."""
    return max((max(rates) / min(rates) - 1 for *_, rates in _rounds(cost)), default=0.0)


def unsteady(cost: Mapping[str, Any]) -> str:
    """Return the reason why the speed of writing is no fact about the models; empty if it is steady.

    The student and its control are of one shape and must be equally fast. A speed that was measured in one round
    alone says nothing about its spread.
    """
    speeds = {model: cost.get(model, {}).get("decode", {}) for model in ("teacher", "student", "control")}
    for model in speeds:
        rounds = [rates for name, phase, rates in _rounds(cost) if (name, phase) == (model, "decode")]
        if not rounds and any(speeds[model].values()):
            return f"the {model} was measured in one round alone"
        ratio = max((max(rates) / min(rates) for rates in rounds), default=1.0)
        if ratio > STEADY:
            return f"one round of the {model} was {times(ratio)} as fast as another"
    for size, student in speeds["student"].items():
        control = speeds["control"].get(size)
        if student and control and (ratio := max(student / control, control / student)) > STEADY:
            return f"student and control are of one shape, but one was {times(ratio)} as fast as the other"
    return ""


def about_rounds(cost: Mapping[str, Any]) -> str:
    """Say in a sentence or two how the speeds were measured and how steady they are; empty without rounds."""
    rounds = number_of_rounds(cost)
    if not rounds:
        return ""
    said = f"Speeds are medians of {rounds} rounds, the models in turn; between rounds they differed by up to"
    said = f"{said} {share(spread(cost))}."
    reason = unsteady(cost)
    return f"{said} That is too unsteady for the headline: {reason}." if reason else said


def _rounds(cost: Mapping[str, Any]) -> Iterator[tuple[str, str, list[float]]]:
    """Yield model, phase and the rates of all rounds, for each batch size."""
    for model, entry in cost.items():
        for phase in PHASES:
            for rates in entry.get("rounds", {}).get(phase, {}).values():
                if len(rates) > 1 and min(rates) > 0:
                    yield model, phase, rates
