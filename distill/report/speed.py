"""Speed, size and memory on the page."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from distill.report.charts import Bar, Group, bar_chart
from distill.report.contents import Cell, Chart, Charts, Content, Note, Section, Table
from distill.report.facts import RunFacts
from distill.report.metrics import MODELS, model_name
from distill.report.numbers import Format, interval, number, rate, size, times
from distill.report.steadiness import about_rounds, number_of_rounds, spread

SIZES = (("bytes_on_disk", "on disk"), ("weight_bytes", "weights in memory"), ("peak_bytes", "peak memory"))
PHASES = (("prefill", "reading (prefill)"), ("decode", "writing (decode)"))


def section(facts: RunFacts) -> Iterator[Section]:
    """Yield the section of speed and size, if any of it was measured."""
    cost = facts.section("cost")
    models = [model for model in MODELS if cost.get(model)]
    if not models:
        return
    contents: list[Content] = []
    charts = [chart for phase, title in PHASES for chart in _chart(cost, models, phase, title)]
    if charts:
        contents.append(Charts(charts))
    rows = []
    for phase, title in PHASES:
        for batch in _batches(cost, models, phase):
            values = {model: cost[model].get(phase, {}).get(batch) for model in models}
            failed = {model for model in models if batch in cost[model].get(phase, {}) and values[model] is None}
            name = Cell(title, small=f"tokens/s, {_batch_name(batch)}")
            rounds = {model: cost[model].get("rounds", {}).get(phase, {}).get(batch) for model in models}
            rows.append(_row(name, values, rate, failed, rounds))
    for key, title in SIZES:
        values = {model: cost[model].get(key) for model in models}
        if any(value is not None for value in values.values()):
            rows.append(_row(Cell(title), values, size))
    head = [Cell("measured on", small=_machine(facts)), *(Cell(model_name(model), role=model) for model in models)]
    if rows and "student" in models and "teacher" in models:
        head.append(Cell("student ÷ teacher"))
    contents.append(Table(head, [row[: len(head)] for row in rows]))
    if (note := _note(facts, cost, models)).text:
        contents.append(note)
    yield Section("speed", "Speed and size", contents)


def _machine(facts: RunFacts) -> str:
    """Return the device that the models ran on; a processor by its name."""
    machine = facts.section("machine")
    device = str(machine.get("device", "a machine not known"))
    return str(machine.get("processor") or device) if device == "cpu" else device


def _batches(cost: Mapping[str, Any], models: list[str], phase: str) -> list[str]:
    found = {batch for model in models for batch in cost[model].get(phase, {})}
    return sorted(found, key=lambda batch: (not batch.isdigit(), int(batch) if batch.isdigit() else 0, batch))


def _batch_name(batch: str) -> str:
    return "1 sequence" if batch == "1" else f"{batch} sequences"


def _row(
    name: Cell,
    values: Mapping[str, Any],
    form: Format,
    failed: Collection[str] = (),
    rounds: Mapping[str, Sequence[float] | None] | None = None,
) -> list[Cell]:
    """Return a row of a figure of each model; below a speed stand its slowest and fastest round."""
    cells = []
    for model, value in values.items():
        missing = "out of memory" if model in failed else "–"
        rates = (rounds or {}).get(model) or ()
        small = interval((min(rates), max(rates)), form) if rates else ""
        cells.append(Cell(missing) if value is None else Cell(form(value), value, small, tuple(rates)))
    student, teacher = values.get("student"), values.get("teacher")
    ratio = student / teacher if student is not None and teacher else None
    return [name, *cells, Cell("–") if ratio is None else Cell(times(ratio), ratio)]


def _chart(cost: Mapping[str, Any], models: list[str], phase: str, title: str) -> Iterator[Chart]:
    groups = []
    for batch in _batches(cost, models, phase):
        values = {model: cost[model].get(phase, {}).get(batch) for model in models}
        bars = [Bar(model_name(m), m, value, rate(value)) for m, value in values.items() if value is not None]
        groups.append(Group(_batch_name(batch), bars))
    chart = bar_chart(groups, f"Tokens a second, {title}; the numbers are in the table below.", "tokens/s", rate)
    if chart:
        yield Chart(chart, title[0].upper() + title[1:], "Longer is faster.")


def _note(facts: RunFacts, cost: Mapping[str, Any], models: list[str]) -> Note:
    said: list[str] = []
    values: list[float] = []
    lengths = [
        (each["prompt_tokens"], each["new_tokens"])
        for each in cost.values()
        if {"prompt_tokens", "new_tokens"} <= each.keys()
    ]
    if lengths:
        read, written = (sorted(set(tokens)) for tokens in zip(*lengths, strict=True))
        values += [*read, *written]
        said.append(
            f"Reading {' or '.join(map(number, read))} tokens, writing {' or '.join(map(number, written))} behind them."
        )
    without = [model_name(model) for model in models if cost[model].get("kv_cache") is False]
    if without:
        said.append(
            f"Writes without a key-value cache, so reads everything again for each token: {', '.join(without)}."
        )
    if rounds := about_rounds(cost):
        values += [number_of_rounds(cost), spread(cost)]
        said.append(rounds)
    drafting = facts.section("speculative")
    if "speedup" in drafting:
        values += drafting.values()
        said.append(_drafting(drafting["speedup"], drafting.get("draft_tokens")))
    return Note(" ".join(said), tuple(values))


def _drafting(speedup: float, tokens: float | None) -> str:
    if not speedup > 1:
        return "As the teacher's draft in speculative decoding the student would cost more than it saves."
    at_a_time = f", {number(tokens)} tokens at a time" if tokens else ""
    gain = f"As the teacher's draft in speculative decoding{at_a_time}, the student makes it {times(speedup)} as fast"
    return f"{gain} (computed from its acceptance and these speeds, not timed)."
