"""Several runs as rows: keys in which they differ, their students' figures, means over seeds, paired differences."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import Any

from distill.report.facts import RunFacts
from distill.report.metrics import BY_KEY
from distill.report.provenance import flat, plain
from distill.system.units import duration

Row = dict[str, Any]

METRICS = ("kl", "nll", "top1_agreement", "acceptance")
"""Figures of a student in the table of runs."""
PLACES = ("run_dir", "cache.dir")
"""Keys in which runs differ without being different."""
SEED = "train.seed"


def run_rows(runs: Sequence[RunFacts], names: Sequence[str]) -> tuple[list[str], list[Row]]:
    """Return the keys in which the runs' experiments differ, and a row for each run: name, keys, student's figures."""
    flats = [flat(facts.section("experiment")) for facts in runs]
    keys = [
        key
        for key in dict.fromkeys(key for each in flats for key in each)
        if key not in PLACES and any(each.get(key) != flats[0].get(key) for each in flats)
    ]
    rows = []
    for facts, name, own in zip(runs, names, flats, strict=True):
        row: Row = {"run": name, **{key: own.get(key) for key in keys}}
        row["parameters"] = facts.section("parameters").get("student")
        found = facts.of("fidelity", "student")
        for metric in METRICS:
            row[metric] = found.get(metric)
            row[f"{metric}.low"], row[f"{metric}.high"] = found.get("intervals", {}).get(metric, (None, None))
        seconds = [line["seconds"] for line in facts.costs if line["phase"] == "train-student"]
        row["training_seconds"] = sum(seconds) if seconds else None
        rows.append(row)
    return keys, rows


def setting_rows(keys: Sequence[str], rows: Sequence[Row]) -> list[Row]:
    """Return a row for each setting, which is the same for all seeds: mean and deviation of each figure over them.

    `kl.difference` is the mean over the seeds of the KL less that of the first setting with the same seed, and
    `kl.difference_error` its standard error, with two seeds and more. Both are missing without a common seed.
    """
    settings = [key for key in keys if key != SEED]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps([row[key] for key in settings], sort_keys=True, default=str), []).append(row)
    first = _by_seed(next(iter(groups.values()), []))
    found = []
    for number, group in enumerate(groups.values()):
        result: Row = {**{key: group[0][key] for key in settings}, "seeds": len(group)}
        for metric in METRICS:
            values = [row[metric] for row in group if row[metric] is not None]
            result[metric] = sum(values) / len(values) if values else None
            result[f"{metric}.deviation"] = _deviation(values)
        own = _by_seed(group)
        pairs = [own[seed] - first[seed] for seed in own if seed in first] if number else []
        result["kl.difference"] = sum(pairs) / len(pairs) if pairs else None
        deviation = _deviation(pairs)
        result["kl.difference_error"] = None if deviation is None else deviation / math.sqrt(len(pairs))
        found.append(result)
    return found


def _by_seed(rows: Sequence[Row]) -> dict[Any, float]:
    return {row.get(SEED): row["kl"] for row in rows if row["kl"] is not None}


def _deviation(values: Sequence[float]) -> float | None:
    """Return the sample's standard deviation; None for fewer than two values."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def as_csv(rows: Sequence[Row]) -> str:
    """Return rows as CSV; lists and mappings are written as YAML on one line, and what is missing is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: plain(value) if isinstance(value, (list, dict)) else value for key, value in row.items()})
    return text.getvalue()


def as_json(keys: Sequence[str], rows: Sequence[Row]) -> str:
    """Return the runs' rows, and those of their settings, as JSON."""
    content = {"differ_in": list(keys), "runs": list(rows), "settings": setting_rows(keys, rows)}
    return json.dumps(content, indent=2) + "\n"


def print_settings(keys: Sequence[str], rows: Sequence[Row]) -> None:
    """Print a table of the settings: means over seeds, and the paired difference from the first one."""
    from rich.console import Console
    from rich.table import Table

    found = setting_rows(keys, rows)
    table = Table(title="students on held-out text: mean ± deviation over seeds (nats)")
    own = [key for key in keys if key != SEED]
    for key in own or ["setting"]:
        table.add_column(key)
    for heading in ("seeds", *(BY_KEY[metric].name for metric in METRICS), "KL less the first's"):
        table.add_column(heading, justify="right")
    for row in found:
        difference = _spread(row["kl.difference"], row["kl.difference_error"], signed=True)
        cells = [_spread(row[metric], row[f"{metric}.deviation"]) for metric in METRICS]
        table.add_row(*([plain(row[key]) for key in own] or ["all"]), str(row["seeds"]), *cells, difference)
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table)
    seconds = [row["training_seconds"] for row in rows if row["training_seconds"] is not None]
    if seconds:
        console.print(f"{len(rows)} runs, {duration(sum(seconds))} of training", soft_wrap=True)


def _spread(mean: float | None, spread: float | None, signed: bool = False) -> str:
    if mean is None:
        return "–"
    text = f"{mean:+.4f}" if signed else f"{mean:.4f}"
    return text if spread is None else f"{text} ± {spread:.4f}"
