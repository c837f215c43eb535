"""Benchmarks on the page: bars against chance, and the share of the teacher's margin that is left."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.report.charts import Bar, Group, bar_chart
from distill.report.contents import Cell, Chart, Charts, Content, Note, Section, Table
from distill.report.facts import RunFacts
from distill.report.metrics import MODELS, model_name
from distill.report.numbers import Format, number, share

CLEAR = 2.0
"""Standard errors above chance that a teacher needs for a margin that can be recovered."""
INTERVAL = 1.96
"""Standard errors on both sides of a score that make its 95 % interval."""


@dataclass(frozen=True)
class Recovered:
    """Recovery over several benchmarks: the sum of the model's margins over the sum of the teacher's."""

    tasks: int
    """Benchmarks with a chance level that both models did."""
    clear: int
    """Benchmarks among these in which the teacher is clearly above chance. Only they count."""
    recovery: float


def score(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the number to show of a benchmark, `{"value": …, "stderr": …}`; empty if it is missing."""
    return result["metrics"].get(result["metric"], {})


def recovery(result: Mapping[str, Any] | None, teacher: Mapping[str, Any] | None) -> float | None:
    """Return `(model - chance) / (teacher - chance)`, or None if the teacher is not clearly above chance."""
    if not result or not teacher or "chance" not in teacher:
        return None
    mine, its = score(result).get("value"), score(teacher).get("value")
    if mine is None or its is None or result["metric"] != teacher["metric"]:
        return None
    margin = its - teacher["chance"]
    is_clear = margin > CLEAR * score(teacher).get("stderr", 0.0) and margin > 0
    return (mine - teacher["chance"]) / margin if is_clear else None


def mean_recovery(benchmarks: Mapping[str, Mapping[str, Any]], model: str) -> Recovered | None:
    """Return a model's recovery over all benchmarks, or None if it did none that has a chance level."""
    teacher, mine = benchmarks.get("teacher", {}), benchmarks.get(model, {})
    both = [task for task in teacher if task in mine and "chance" in teacher[task]]
    clear = [task for task in both if recovery(mine[task], teacher[task]) is not None]
    if not both:
        return None
    margins = [[score(by[task])["value"] - teacher[task]["chance"] for task in clear] for by in (mine, teacher)]
    return Recovered(len(both), len(clear), sum(margins[0]) / sum(margins[1]) if clear else 0.0)


def section(facts: RunFacts) -> Iterator[Section]:
    """Yield the section of benchmarks, if there are any."""
    results = facts.section("benchmarks")
    models = [model for model in MODELS if results.get(model)]
    tasks = list(dict.fromkeys(task for model in models for task in results[model]))
    if not tasks:
        return
    by_task = {task: {model: results[model][task] for model in models if task in results[model]} for task in tasks}
    contents: list[Content] = []
    groups = [_group(task, found) for task, found in by_task.items() if _is_share(found)]
    contents += score_charts(groups, f"Benchmark scores of {', '.join(models)}")
    overlaps = facts.of("overlaps", "teacher")
    contents.append(_table(by_task, models, overlaps))
    contents.append(Note(_explanation(results, by_task, overlaps)))
    contents.append(_all_metrics(by_task))
    yield Section("benchmarks", "Benchmarks", contents)


def score_charts(groups: Sequence[Group], label: str) -> Iterator[Charts]:
    """Yield bars of scores in two columns of one scale."""
    half = math.ceil(len(groups) / 2)
    said = f"{label}, with chance levels; the numbers are in the table."
    axis = "score; whiskers: 95 % interval; dashed: chance"
    charts = [bar_chart(part, said, axis, share, groups) for part in (groups[:half], groups[half:])]
    if any(charts):
        yield Charts([Chart(chart) for chart in charts if chart])


def _is_share(found: Mapping[str, Mapping[str, Any]]) -> bool:
    values = [score(result).get("value") for result in found.values()]
    return all(value is not None and 0 <= value <= 1 for value in values)


def form_of(value: float) -> Format:
    """Choose the format of a score: scores are shares, but a perplexity is not."""
    return share if 0 <= value <= 1 else number


def bar(name: str, role: str, result: Mapping[str, Any]) -> Bar:
    """Return a score's bar with its 95 % interval."""
    found = score(result)
    error = found.get("stderr")
    return Bar(name, role, found["value"], share(found["value"]), None if error is None else INTERVAL * error)


def _group(task: str, found: Mapping[str, Mapping[str, Any]]) -> Group:
    one = next(iter(found.values()))
    bars = [bar(model_name(model), model, result) for model, result in found.items()]
    chance = one.get("chance")
    return Group(task, bars, chance, "" if chance is None else f"chance {share(chance)}")


def _table(
    by_task: Mapping[str, Mapping[str, Mapping[str, Any]]], models: list[str], overlaps: Mapping[str, Any]
) -> Table:
    learned = [model for model in models if model != "teacher"]
    head = [Cell("benchmark"), *(Cell(model_name(model), role=model) for model in models), Cell("chance")]
    head += [Cell("recovery", small=model_name(model)) for model in learned]
    rows = []
    for task, found in by_task.items():
        one = next(iter(found.values()))
        row = [_task_cell(task, found, overlaps.get(task, {}).get("overlapping"))]
        row += [score_cell(found.get(model)) for model in models]
        chance = one.get("chance")
        row.append(Cell("none") if chance is None else Cell(share(chance), chance))
        for model in learned:
            value = recovery(found.get(model), found.get("teacher"))
            row.append(Cell("–") if value is None else Cell(share(value), value))
        rows.append(row)
    return Table(head, rows)


def _task_cell(task: str, found: Mapping[str, Mapping[str, Any]], overlapping: int | None) -> Cell:
    said, values = [next(iter(found.values()))["metric"]], []
    for key, unit in (("documents", "documents"), ("truncated", "prompts cut")):
        numbers = sorted({result[key] for result in found.values() if key in result})
        values += numbers
        if numbers:
            said.append(f"{' or '.join(map(number, numbers))} {unit}")
    if overlapping is not None:
        said.append(f"{number(overlapping)} of them in the training text")
        values.append(overlapping)
    return Cell(task, small=", ".join(said), small_values=tuple(values))


def score_cell(result: Mapping[str, Any] | None, metric: str = "") -> Cell:
    """Return a score with its standard error."""
    found = {} if result is None else result["metrics"].get(metric or result["metric"], {})
    if "value" not in found:
        return Cell("–")
    form = form_of(found["value"])
    error = found.get("stderr")
    small, exact = ("", ()) if error is None else (f"± {form(error)}", (error,))
    return Cell(form(found["value"]), found["value"], small, exact)


def _explanation(
    results: Mapping[str, Any], by_task: Mapping[str, Mapping[str, Mapping[str, Any]]], overlaps: Mapping[str, Any]
) -> str:
    text = "±: standard error. Recovery: the model's margin above chance over the teacher's"
    unclear = any(
        "chance" in found.get("teacher", {}) and recovery(found["teacher"], found["teacher"]) is None
        for found in by_task.values()
    )
    if unclear:
        text += "; –: the teacher is not clearly above chance itself"
    if overlaps:
        text += "; in the training text: 13 words in a row stand there too, or all of a shorter text"
    totals = []
    for model in ("student", "control"):
        total = mean_recovery(results, model)
        if total is not None and total.clear:
            totals.append(f"{model} {share(total.recovery)}")
    return f"{text}. Over all: {', '.join(totals)}." if totals else f"{text}."


def _all_metrics(by_task: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    models = list(dict.fromkeys(model for found in by_task.values() for model in found))
    rows = []
    for task, found in by_task.items():
        for metric in dict.fromkeys(name for result in found.values() for name in result["metrics"]):
            rows.append([Cell(task, small=metric), *(score_cell(found.get(model), metric) for model in models)])
    head = [Cell("benchmark"), *(Cell(model_name(model), role=model) for model in models)]
    return Table(head, rows, summary="Every metric of every benchmark")
