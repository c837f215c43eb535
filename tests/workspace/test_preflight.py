"""Before a phase begins it is forecast: what cannot fit is refused, what ran is compared with its forecast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_cannot_fit_is_refused_before_it_begins(world: Any, distill: Any, tmp_path: Path) -> None:
    """A limit below what the libraries alone take on a CPU: nothing helps, and nothing is made."""
    file = world.write(tmp_path / "experiment.yaml")
    for phase in ("cache-teacher", "run"):
        distill(phase, file, "--memory_limit", "100MB").refused("cache-teacher: needs", "0.1 GB", "distill plan")
    assert not list((tmp_path / "run/cache").glob("*.safetensors"))
    distill("cache-teacher", file, "--memory_limit", "12 potatoes").refused("memory_limit", "12GiB")
    distill("cache-teacher", file, "--memory_limit", "100MB", "--preflight", "false").done()


def test_forecast_and_measured_are_kept_and_shown(world: Any, distill: Any, tmp_path: Path) -> None:
    file = world.write(tmp_path / "experiment.yaml")
    outcome = distill("run", file, "--memory_limit", "12GiB", "--train.max_steps", 3).done()
    rows = {row["what"]: row for row in json.loads((tmp_path / "run/forecast.json").read_text())["rows"]}
    assert set(rows) == {"cache-teacher: time", "train-student: time"}
    assert all(row["forecast"] > 0 and row["measured"] > 0 and row["unit"] == "s" for row in rows.values())
    assert "forecast: train-student: time" in outcome.out
    page = (tmp_path / "run/report.html").read_text()
    assert "Forecast and measured" in page and "train-student: time" in page
    again = distill("run", file, "--memory_limit", "12GiB", "--train.max_steps", 3).done()
    assert "forecast: " not in again.out
