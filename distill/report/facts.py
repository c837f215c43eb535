"""The facts that a page shows, read from the run's folder and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.report.curves import Curves, read_curves
from distill.report.schema import COST_LINE, EVALUATION, FORECAST, PREDICTION, SEARCH, checked
from distill.report.training_texts import Line, read_texts
from distill.system import ledger
from distill.system.files import names_only, read_bounded

LIMIT = 256 << 20
"""Largest size in bytes of a file that could be ours."""


@dataclass(frozen=True)
class RunFacts:
    """The facts known of a run. Anything that was not measured is absent or empty."""

    run: Path
    evaluation: Mapping[str, Any]
    """Content of evaluation.json: shares 0 to 1, nats, bytes, tokens a second."""
    curves: Mapping[str, Curves]
    """Curves of `student` and `control`."""
    texts: Mapping[str, list[Line]]
    """Texts that `student` and `control` wrote while they were trained."""
    costs: tuple[Mapping[str, Any], ...]
    """Content of costs.jsonl: one object for each invocation of a phase."""
    forecast: tuple[Mapping[str, Any], ...]
    """Rows of forecast.json: what, unit, forecast, measured."""
    search: Mapping[str, Any]
    """Content of search.json: the candidates with their sizes and held-out KL, and the chosen sizes."""
    predictions: Mapping[str, Mapping[str, Any]]
    """Content of prediction.json of `student` and `control`: the held-out KL that was predicted, and the end."""

    @classmethod
    def read(cls, run: Path) -> RunFacts:
        """Read a run folder. Raises UserError if it is none or if a file in it is damaged."""
        if not run.is_dir():
            raise UserError(f"{run}: no such folder: give the run_dir of an experiment")
        evaluation = _read_object(run / "evaluation.json", EVALUATION)
        if "experiment" in evaluation:  # for others to read: a path says more about a machine than about a run
            evaluation["experiment"] = names_only(evaluation["experiment"])
        facts = cls(
            run,
            evaluation,
            {role: curves for role in ("student", "control") if (curves := read_curves(run / "logs" / role))},
            {role: lines for role in ("student", "control") if (lines := read_texts(run / "logs" / role))},
            _read_costs(run / ledger.FILE),
            tuple(_read_object(run / "forecast.json", FORECAST).get("rows", [])),
            _read_object(run / "search.json", SEARCH),
            {
                role: predicted
                for role in ("student", "control")
                if (predicted := _read_object(run / "logs" / role / "prediction.json", PREDICTION))
            },
        )
        if not (facts.evaluation or facts.curves or facts.costs):
            raise UserError(f"{run}: nothing was measured here yet: run distill evaluate, or give another run_dir")
        return facts

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.run.resolve().name

    def section(self, name: str) -> Mapping[str, Any]:
        """Return a section of evaluation.json; empty if it is absent."""
        return self.evaluation.get(name, {})

    def of(self, section: str, model: str) -> Mapping[str, Any]:
        """Return a model's entry in a section of evaluation.json; empty if it is absent."""
        return self.section(section).get(model, {})

    def ratio(self, section: str, *keys: str) -> float | None:
        """Return the student's number over the teacher's, as in `ratio("cost", "decode", "1")`; None if unknown."""
        values: list[Any] = [self.section(section).get("student"), self.section(section).get("teacher")]
        for key in keys:
            values = [value.get(key) if isinstance(value, Mapping) else None for value in values]
        student, teacher = values
        return None if student is None or not teacher else student / teacher


def _read(path: Path) -> str | None:
    try:
        return read_bounded(path, LIMIT).decode("utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: damaged (not UTF-8): make it anew with distill evaluate") from None


def _read_object(path: Path, spec: dict[str, Any]) -> dict[str, Any]:
    text = _read(path)
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}: damaged (not JSON{line}): make it anew with distill evaluate") from None
    result: dict[str, Any] = checked(content, spec, str(path))
    return result


def _read_costs(path: Path) -> tuple[dict[str, Any], ...]:
    try:
        return tuple(checked(line, COST_LINE, str(path)) for line in ledger.read(path.parent))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
