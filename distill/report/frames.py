"""The figures of a run as tables of rows: lists of mappings, or DataFrames where pandas is installed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import UserError, did_you_mean
from distill.report.facts import RunFacts
from distill.report.provenance import flat

if TYPE_CHECKING:
    from pandas import DataFrame

SECTIONS = ("fidelity", "benchmarks", "cost")
"""Sections of evaluation.json with an entry for each model."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """Figures and curves of a run, as far as they were measured."""

    facts: RunFacts

    @classmethod
    def read(cls, run: str | Path) -> Results:
        """Read a run's folder. Raises UserError for another folder, and for damaged files."""
        return cls(RunFacts.read(Path(run)))

    @property
    def evaluation(self) -> Mapping[str, Any]:
        """Content of evaluation.json: shares 0 to 1, nats, bytes, tokens a second. Empty before an evaluation."""
        return self.facts.evaluation

    def rows(self, section: str = "fidelity") -> list[Row]:
        """Return a row for each model (of `benchmarks`: and task), its figures by name.

        An interval is two figures, `kl.low` and `kl.high`. Tables inside an entry, such as `by_entropy`, are left to
        `evaluation`. Raises UserError for a section that is none of `fidelity`, `benchmarks` and `cost`.
        """
        if section not in SECTIONS:
            raise UserError(f"results: no section '{section}'{did_you_mean(section, SECTIONS)}")
        found = self.facts.section(section)
        if section == "benchmarks":
            return [
                {"model": model, "task": task, **_figures(entry)}
                for model, tasks in found.items()
                for task, entry in tasks.items()
            ]
        return [{"model": model, **_figures(entry)} for model, entry in found.items()]

    def curve_rows(self, role: str = "student") -> list[Row]:
        """Return a row for each step at which something was logged while `student` or `control` was trained."""
        steps: dict[float, Row] = {}
        for name, points in self.facts.curves.get(role, {}).items():
            for step, value in points:
                steps.setdefault(step, {"step": int(step)})[name] = value
        return [steps[step] for step in sorted(steps)]

    def frame(self, section: str = "fidelity") -> DataFrame:
        """Return `rows` as a DataFrame whose index are the models (and tasks). Raises UserError without pandas."""
        keys = ["model", "task"] if section == "benchmarks" else ["model"]
        found = frame(self.rows(section))
        return found.set_index(keys) if len(found) else found

    def curves(self, role: str = "student") -> DataFrame:
        """Return `curve_rows` as a DataFrame whose index is the step. Raises UserError without pandas."""
        found = frame(self.curve_rows(role))
        return found.set_index("step") if len(found) else found


def frame(rows: list[Row]) -> DataFrame:
    """Return rows as a DataFrame. Raises UserError without pandas."""
    try:
        import pandas
    except ImportError:
        raise UserError("a DataFrame needs pandas: pip install pandas, or use rows() and curve_rows()") from None
    return pandas.DataFrame.from_records(rows)


def _figures(entry: Mapping[str, Any]) -> Row:
    """Return an entry's figures: nested names with dots, the two ends of an interval, no tables."""
    result: Row = {}
    for name, value in flat({key: value for key, value in entry.items() if key != "rounds"}).items():
        if name.startswith("intervals."):
            metric = name.removeprefix("intervals.")
            result |= {f"{metric}.low": value[0], f"{metric}.high": value[1]}
        elif not isinstance(value, (list, dict)):
            result[name] = value
    return result
