"""Before a phase: whether it fits. While it runs: no more memory than allowed. After it: was the forecast right."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from distill import ledger
from distill.cache.budget import parse_size
from distill.config import Experiment
from distill.errors import UserError
from distill.models.devices import pick_device
from distill.processes import is_first_process
from distill.progress import say
from distill.workspace.folders import write_json
from distill.workspace.forecast import PhaseForecast, refuse_what_cannot_fit
from distill.workspace.forecasting.phases import Phase

FILE = "forecast.json"


@contextlib.contextmanager
def preflight(experiment: Experiment, phase: Phase, run: Path) -> Iterator[None]:
    """Run a phase that fits, within `memory_limit`; note forecast and measured in the run's forecast.json.

    Raises UserError, before any weight is loaded, for a phase that cannot fit, with the change that makes it fit.
    """
    limit = None if experiment.memory_limit is None else parse_size(experiment.memory_limit, "memory_limit")
    expected = refuse_what_cannot_fit(experiment, phase, limit) if experiment.preflight else None
    device = pick_device(experiment.train.accelerator)
    if limit is not None and device.type == "cuda":
        _hold_to(limit, device)
    is_whole = not any(line["phase"] == phase for line in ledger.read(run))
    started = time.monotonic()
    yield
    if expected is not None and is_first_process():
        _compare(expected, time.monotonic() - started if is_whole else None, device, run)


def _hold_to(limit: int, device: torch.device) -> None:
    """Let torch's allocator have no more; what the CUDA context takes comes on top."""
    total = torch.cuda.get_device_properties(device).total_memory
    if limit > total:
        raise UserError(f"memory_limit: {limit / 1e9:.1f} GB is more than this card's {total / 1e9:.1f} GB")
    torch.cuda.set_per_process_memory_fraction(limit / total, device)


def _compare(expected: PhaseForecast, seconds: float | None, device: torch.device, run: Path) -> None:
    """Rows of what is known of both; those of other phases stay."""
    rows: list[dict[str, Any]] = []
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        rows.append(_row(f"{expected.phase}: peak memory", "bytes", expected.peak_bytes, peak))
    if seconds is not None and expected.seconds is not None:
        rows.append(_row(f"{expected.phase}: time", "s", expected.seconds, seconds))
    for row in rows:
        say(f"forecast: {row['what']} {row['forecast']:.4g} {row['unit']}, measured {row['measured']:.4g}")
    others = [row for row in _rows(run) if row["what"] not in {own["what"] for own in rows}]
    write_json(run / FILE, {"rows": [*others, *rows]})


def _row(what: str, unit: str, forecast: float, measured: float) -> dict[str, Any]:
    return {"what": what, "unit": unit, "forecast": forecast, "measured": measured}


def _rows(run: Path) -> list[dict[str, Any]]:
    try:
        return json.loads((run / FILE).read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError):
        return []
