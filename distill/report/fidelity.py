"""Closeness of the models to their teacher on the page: the main table, the curves, and the places of difference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distill.report.charts import Line, binned_chart, line_chart
from distill.report.contents import Cell, Chart, Charts, Content, Note, Section, Table
from distill.report.curves import Points, thin
from distill.report.facts import RunFacts
from distill.report.held_out import about_amount, about_intervals, kl_scope, training_kl
from distill.report.metrics import ARROWS_MEAN, BY_KEY, METRICS, MODELS, Metric, model_name, reading_of
from distill.report.numbers import SPACE, count, edge, interval, nats, number, probability, share, with_sign

MOST_POINTS = 240
"""Largest number of points of a curve. In a longer one, neighbours are drawn as their mean."""


def main_section(facts: RunFacts) -> Iterator[Section]:
    """Yield every figure of every model, and the student against the control."""
    models = [model for model in MODELS if facts.of("fidelity", model) or model in facts.section("parameters")]
    if not models:
        return
    rows = []
    if facts.section("parameters"):
        row = [_parameters(facts, model) for model in models]
        rows.append([Cell("parameters"), *row])
    for metric in METRICS:
        cells = [figure(facts.of("fidelity", model), metric) for model in models]
        if any(cell.value is not None for cell in cells):
            rows.append([Cell(metric.heading, small=metric.unit), *cells])
    head = [Cell("on held-out text"), *(Cell(model_name(model), role=model) for model in models)]
    contents: list[Content] = [Table(head, rows)]
    contents.append(Note(_about_the_text(facts), tuple(facts.section("text").values())))
    contents += [*_against_control(facts)]
    shown = [metric for metric in METRICS if any(metric.key in facts.of("fidelity", model) for model in models)]
    meanings = [[Cell(metric.name), Cell(metric.meaning)] for metric in shown]
    if "before" in models:
        meanings.append([Cell(model_name("before")), Cell("the student as it was made, before it learned anything")])
    if "control" in models:
        meanings.append(
            [Cell("control"), Cell("the same student, trained as long on the text alone, without a teacher")]
        )
    if meanings:
        contents.append(Table([Cell("figure"), Cell("meaning")], meanings, summary="What the figures mean", wraps=True))
    yield Section("figures", "Student and teacher", contents)


def _parameters(facts: RunFacts, model: str) -> Cell:
    value = facts.section("parameters").get(model)
    return Cell("–") if value is None else Cell(count(value), value)


def figure(figures: Mapping[str, Any], metric: Metric) -> Cell:
    """Return the cell of a model's figure, with its interval below if there is one."""
    if metric.key not in figures:
        return Cell("–")
    ends = figures.get("intervals", {}).get(metric.key)
    small = "" if ends is None else interval(ends, metric.form)
    return Cell(metric.form(figures[metric.key]), figures[metric.key], small, tuple(ends or ()))


def _about_the_text(facts: RunFacts) -> str:
    text = facts.section("text")
    said = about_amount(text)
    if any("intervals" in facts.of("fidelity", model) for model in MODELS):
        said += f" {about_intervals(text)}"
    said += f" {ARROWS_MEAN}"
    if "dropped_mass" in text:
        said += f" Figures beside the teacher are{kl_scope(text)}:"
        said += f" {share(text['dropped_mass'])} of the teacher's probability is on tokens that the student lacks."
    if text.get("left_out_samples"):
        said += f" {number(text['left_out_samples'])} samples with such tokens in them are left out."
    return said.strip()


def _against_control(facts: RunFacts) -> Iterator[Table]:
    tests = facts.section("student_against_control")
    rows = []
    for metric in METRICS:
        if metric.key not in tests:
            continue
        test = tests[metric.key]
        ends = test.get("interval")
        signed = lambda value, form=metric.form: with_sign(form(value))  # noqa: E731  # two uses, one line
        rows.append(
            [
                Cell(metric.name, small=metric.unit),
                Cell(signed(test["difference"]), test["difference"]),
                Cell("–") if ends is None else Cell(interval(ends, signed), None, "", tuple(ends)),
                Cell(probability(test["p"]).removeprefix("= "), test["p"]) if "p" in test else Cell("–"),
                Cell(reading_of(test, metric.better)),
            ]
        )
    if rows:
        head = [
            Cell("student minus control"),
            Cell("difference"),
            Cell("95 % interval"),
            Cell("p"),
            Cell("student is"),
        ]
        yield Table(head, rows, caption="Student against control, paired by sample")


def curve_section(facts: RunFacts) -> Iterator[Section]:
    """Yield the held-out KL and the loss of student and control over the steps."""
    named = [(role, role, curves) for role, curves in facts.curves.items()]
    qualifier = training_kl(facts.section("experiment"))
    charts = curve_charts(named, [qualifier] * len(named))
    if not charts:
        return
    contents: list[Content] = [Charts(charts)]
    rows = []
    named_kl = " ".join(filter(None, ("held-out KL", qualifier)))
    for column, title in (("held_out_kl", named_kl), ("loss", "training loss")):
        for role, curves in facts.curves.items():
            finite = [point for point in curves.get(column, []) if math.isfinite(point[1])]
            if finite:
                least = min(finite, key=lambda point: point[1])
                rows.append(
                    [
                        Cell(f"{title}, {role}", role=role),
                        *(_at_step(*point) for point in (finite[0], least, finite[-1])),
                    ]
                )
    contents.append(Table([Cell("nats/token"), Cell("first"), Cell("lowest"), Cell("last")], rows))
    contents += _predictions(facts)
    yield Section("training", "Training", contents)


def _predictions(facts: RunFacts) -> Iterator[Table]:
    """Yield what was predicted of the held-out KL while training, beside what came."""
    rows = []
    for role, found in facts.predictions.items():
        for when, ends in found["predicted"].items():
            came = found.get("end")
            rows.append(
                [
                    Cell(f"{role}, after {float(when):.0%} of the steps".replace("%", f"{SPACE}%"), role=role),
                    *(_predicted(ends.get(factor)) for factor in ("1", "3", "10")),
                    Cell("–") if came is None else Cell(nats(came), came),
                ]
            )
    if rows:
        head = [Cell("nats/token"), Cell("predicted"), *(Cell(f"{n} × the tokens") for n in (3, 10)), Cell("came")]
        yield Table(head, rows, caption="Held-out KL that the training will end at, as its learning curve had it early")


def _predicted(found: Mapping[str, float] | None) -> Cell:
    if found is None:
        return Cell("–")
    ends = found["low"], found["high"]
    return Cell(nats(found["kl"]), found["kl"], interval(ends, nats), ends)


def _at_step(step: float, value: float) -> Cell:
    return Cell(nats(value), value, f"step{SPACE}{number(step)}")


def curve_charts(named: Sequence[tuple[str, str, Mapping[str, Points]]], qualifiers: Sequence[str]) -> list[Chart]:
    """Draw charts of held-out KL and loss of several trainings: name, role and curves of each.

    `qualifiers` are those of each training's held-out KL (`training_kl`). KLs of different kinds share no chart.
    """
    kinds = {kind: [each for each, its in zip(named, qualifiers, strict=True) if its == kind] for kind in qualifiers}
    said = "Distance from the teacher on text that is never trained on, from the cache while training"
    drawn = []
    for kind, those in kinds.items():
        note = f"{said}: {kind}. No other KL compares with it." if kind else f"{said}."
        drawn.append(("held_out_kl", " ".join(filter(None, ("Held-out KL", kind))), "nats/token", note, those))
    loss_note = "Each training minimises its own loss; only the shapes compare."
    drawn.append(("loss", "Training loss", "loss, nats/token", loss_note, [*named]))
    charts = []
    for column, title, y_name, note, trainings in drawn:
        lines, width = [], 1
        lost = 0
        for name, role, curves in trainings:
            points = curves.get(column, [])
            lost += sum(not math.isfinite(value) for _, value in points)
            points, each = thin(points, MOST_POINTS)
            width = max(width, each)
            lines.append(Line(name, role, points))
        names = ", ".join(line.name for line in lines if line.points)
        chart = line_chart(lines, f"{title} over optimiser steps: {names}.", "optimiser steps", y_name, nats)
        if chart:
            averaged = f" Points are means of up to {width} logged values." if width > 1 else ""
            broken = f" {lost} logged values are not finite." if lost else ""
            charts.append(Chart(chart, title, note + averaged + broken))
    return charts


def bin_section(facts: RunFacts) -> Iterator[Section]:
    """Yield fidelity by the teacher's entropy and by position in the document."""
    contents: list[Content] = []
    for key, by, x_name, said in (
        (
            "by_entropy",
            "teacher's entropy",
            "teacher's entropy, nats",
            "Left: the teacher is sure. Right: it sees many ways.",
        ),
        ("by_position", "position", "tokens before it in its document", "Left: little context. Right: much."),
    ):
        found = {model: facts.of("fidelity", model).get(key, []) for model in MODELS}
        found = {model: bins for model, bins in found.items() if bins}
        charts = [
            Chart(chart, f"{BY_KEY[metric].name} by {by}", said + " Pale bars: share of the tokens.")
            for metric in ("kl", "top1_agreement")
            if (chart := binned(found, metric, by, x_name))
        ]
        if charts:
            contents.append(Charts(charts))
        if found:
            contents.append(_bin_table(found, by))
    if contents:
        yield Section("where", "Where they differ", contents)


def binned(found: Mapping[str, Sequence[Mapping[str, Any]]], metric: str, by: str, x_name: str) -> Any:
    """Return a chart of a metric in bins, of student and control; empty without any."""
    shown = {model: bins for model, bins in found.items() if model in ("student", "control")}
    every = {each["from"]: each for bins in shown.values() for each in bins}
    if not every:
        return ""
    # The file leaves bins without positions out, but the axis must have them.
    starts = sorted({*every, *(each["to"] for each in every.values() if "to" in each)})
    if "to" not in every[max(every)]:
        starts.append(math.inf)
    lines = []
    for model, bins in shown.items():
        values = {each["from"]: each.get(metric, math.nan) for each in bins}
        lines.append(
            Line(model, model, [(float(i), values.get(start, math.nan)) for i, start in enumerate(starts[:-1])])
        )
    total = sum(each["positions"] for each in every.values()) or 1
    shares = [every[start]["positions"] / total if start in every else math.nan for start in starts[:-1]]
    form = BY_KEY[metric].form
    y_name = BY_KEY[metric].unit or "share of tokens"
    label = f"{BY_KEY[metric].name} by {by}, of {', '.join(shown)}; the numbers are in the table below."
    return binned_chart([*map(edge, starts)], lines, shares, label, x_name, y_name, form)


def _bin_table(found: Mapping[str, Sequence[Mapping[str, Any]]], by: str) -> Table:
    metrics = [
        key for key in ("nll", "kl", "top1_agreement", "acceptance") if any(key in b for v in found.values() for b in v)
    ]
    head = [
        Cell(by),
        Cell("model"),
        Cell("tokens"),
        *(Cell(BY_KEY[key].name, small=BY_KEY[key].unit) for key in metrics),
    ]
    rows = []
    for model, bins in found.items():
        for each in bins:
            ends = (each["from"], each["to"]) if "to" in each else (each["from"],)
            said = f"{edge(ends[0])} to {edge(ends[1])}" if len(ends) == 2 else f"from {edge(ends[0])}"
            row = [
                Cell(said, small_values=ends),
                Cell(model_name(model), role=model),
                Cell(number(each["positions"]), each["positions"]),
            ]
            row += [Cell(BY_KEY[key].form(each[key]), each[key]) if key in each else Cell("–") for key in metrics]
            rows.append(row)
    return Table(head, rows, summary=f"All figures by {by}")
