"""A measurement of several rounds takes the models in turn, one in memory at a time, and counts when all are done."""

from __future__ import annotations

from typing import Any

from distill.experiment.folders import Folders
from distill.experiment.subjects import Subject
from distill.recipes.evaluate.command import _measure_in_turn
from distill.recipes.evaluate.measurement import Measurement
from distill.recipes.evaluate.measurements import Cost
from distill.recipes.evaluate.results import Results


class Rounds(Measurement):
    section, together, rounds = "speed", True, 3
    inputs = {}  # noqa: RUF012

    def measure(self, subject: Subject, loaded: Any) -> Any:
        return loaded

    def join(self, entries: list[Any]) -> Any:
        return entries


def test_the_models_are_measured_in_turn(tmp_path: Any) -> None:
    order: list[str] = []

    def subject(name: str) -> Subject:
        def load() -> Any:
            order.append(name)
            return len(order)

        return Subject(name, {"name": name}, [], load)

    subjects = [subject(name) for name in ("teacher", "before", "student", "control")]
    measurement = Rounds()
    folders = Folders(tmp_path, tmp_path / "cache", tmp_path)
    results = Results(folders, subjects, [measurement])
    _measure_in_turn(measurement, subjects, results)
    assert order == ["teacher", "student", "control"] * 3
    assert results.view() == {"speed": {"teacher": [1, 4, 7], "student": [2, 5, 8], "control": [3, 6, 9]}}
    assert results.is_complete
    _measure_in_turn(measurement, subjects, Results(folders, subjects, [measurement]))
    assert len(order) == 9, "nothing is measured twice"


def test_speeds_are_measured_in_turn() -> None:
    assert Cost.rounds >= 3
