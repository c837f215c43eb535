"""The curves of a training, read from its CSV logs: one line made from the logs of all its starts."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.errors import UserError
from distill.system.files import read_bounded

Points = list[tuple[float, float]]
Curves = Mapping[str, Points]
"""Column of the log → (optimiser step, value). Values that are not finite are included."""

COLUMNS = ("loss", "held_out_kl")


def read_curves(folder: Path) -> dict[str, Points]:
    """Return the curves in a folder of logs; empty if there are none.

    metrics.1.csv is the log of the first start, metrics.2.csv of the second, metrics.csv of the last. A start resumes
    at its checkpoint's step, or at 0, and repeats everything that earlier starts logged from there on. Raises UserError
    for a damaged line. The last line of a file may be torn.
    """
    curves: dict[str, Points] = {column: [] for column in COLUMNS}
    for path in _in_order(folder):
        start = _read_log(path)
        for column in COLUMNS:
            # A column by itself: a step's loss has the number of steps before it, a measurement that of those made.
            first = start[column][0][0] if start[column] else math.inf
            curves[column] = [point for point in curves[column] if point[0] < first] + start[column]
    return {column: points for column, points in curves.items() if points}


def _in_order(folder: Path) -> list[Path]:
    earlier = {path.suffixes[0][1:]: path for path in folder.glob("metrics.*.csv") if len(path.suffixes) == 2}
    numbered = sorted((int(number), path) for number, path in earlier.items() if number.isdigit())
    last = folder / "metrics.csv"
    return [path for _, path in numbered] + ([last] if last.is_file() else [])


def _read_log(path: Path) -> dict[str, Points]:
    curves: dict[str, Points] = {column: [] for column in COLUMNS}
    try:
        rows = list(csv.DictReader(read_bounded(path).decode("utf-8").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a log ({error})") from None
    for number, row in enumerate(rows, 2):
        try:
            step = float(row["step"])
            for column in COLUMNS:
                if row.get(column) not in (None, ""):
                    curves[column].append((step, float(row[column])))
        except (KeyError, TypeError, ValueError):
            if number < len(rows) + 1:
                raise UserError(f"{path}: line {number} is no line of a log: remove it, or the file") from None
    return {column: sorted(points, key=lambda point: point[0]) for column, points in curves.items()}


def thin(points: Sequence[tuple[float, float]], most: int) -> tuple[Points, int]:
    """Return at most about `most` points, each the mean of several neighbours, and their number (1: unchanged)."""
    width = max(1, math.ceil(len(points) / most))
    if width == 1:
        return list(points), 1
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [(_mean([x for x, _ in group]), _mean([y for _, y in group])) for group in groups], width


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
