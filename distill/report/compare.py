"""Several runs on one page: their key figures, their curves over one another, and how their experiments differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill import __version__
from distill.errors import UserError
from distill.report.benchmarks import bar, mean_recovery, score, score_cell, score_charts
from distill.report.charts import Group
from distill.report.contents import Cell, Charts, Content, Note, Page, Section, Table
from distill.report.facts import RunFacts
from distill.report.fidelity import curve_charts
from distill.report.held_out import kl_scope, training_kl
from distill.report.metrics import ARROWS_MEAN, BY_KEY, with_arrow
from distill.report.numbers import Format, count, duration, interval, nats, number, rate, share, size
from distill.report.page import render
from distill.report.provenance import flat, plain

MADE_BY = "distill compare"
"""Generator that these pages name. A run's own page names another, so that the two are not confused."""
COLOURS = 8
SUBTITLE = 100
"""Largest number of letters in the runs' names above the title. The table has them all."""
OF_THE_TEXT = ("corpus", "tokenizer", "chat_template")
"""Fingerprints that two runs share if they were measured on the same held-out text."""


@dataclass(frozen=True)
class Column:
    """A key figure of a run. `about` names the things it depends on; runs that differ in them are not ranked by it."""

    name: str
    small: str
    better: str
    """"lower", "higher", or empty, which means that none is marked as best."""
    form: Format
    value: Callable[[RunFacts], float | None]
    about: str = ""
    ends: Callable[[RunFacts], Sequence[float] | None] = lambda facts: None


def compare(runs: list[Path]) -> str:
    """Return the page of several runs, as HTML. Raises UserError for fewer than two, a repeated one, and damage."""
    if len(runs) < 2:
        raise UserError("compare: give two or more runs, for example: distill compare runs/a runs/b")
    folders = [run.resolve() for run in runs]
    for index, folder in enumerate(folders):
        if folder in folders[:index]:
            raise UserError(f"{runs[index]}: given twice: give each run once")
    facts = [RunFacts.read(run) for run in runs]
    return render(compare_page(facts), f"{MADE_BY} {__version__}")


def compare_page(runs: Sequence[RunFacts]) -> Page:
    """Return the page of several runs."""
    names = distinct_names([facts.run for facts in runs])
    unlike = _unlike(runs)
    sections = [
        *_figures_section(runs, names, unlike),
        *_curve_section(runs, names),
        *_benchmark_section(runs, names),
        *_difference_section(runs, names),
    ]
    warnings = [warning for warning in unlike.values() if warning]
    listed = ", ".join(names)
    title = f"{len(runs)} runs compared"
    return Page(title, listed if len(listed) <= SUBTITLE else "", _verdict(runs, names, unlike), warnings, sections)


def distinct_names(runs: Sequence[Path]) -> list[str]:
    """Return as much of the end of each path as tells it from the others."""
    parts = [run.resolve().parts for run in runs]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts) and depth < max(map(len, parts)):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _unlike(runs: Sequence[RunFacts]) -> dict[str, str]:
    """Return the reasons why some figures cannot be compared: key of `Column.about` → warning."""
    measured = [facts for facts in runs if facts.evaluation]
    texts = [{**facts.section("text"), **_prints(facts, OF_THE_TEXT)} for facts in measured]
    teachers = [
        _prints(facts, [key for key in facts.section("fingerprints") if key.startswith("teacher")])
        for facts in measured
    ]
    machines = [
        {key: facts.section("machine").get(key) for key in ("processor", "device", "cores")} for facts in measured
    ]
    unlike = {}
    if _differ(texts):
        unlike["text"] = (
            "These runs were measured on different held-out text: their figures do not compare, "
            "and none of them is marked as best."
        )
    if len({kl_scope(facts.section("text")) for facts in measured if facts.section("text")}) > 1:
        unlike["vocabulary"] = (
            "Some of these students have only some of the teacher's tokens, and their KL is over these alone: "
            "it does not compare with a KL over all of them."
        )
    if _differ(teachers):
        unlike["teacher"] = "These runs have different teachers: each KL is a distance from another model."
    if _differ(machines):
        unlike["machine"] = "These runs were measured on different machines: their speeds do not compare."
    return unlike


def _prints(facts: RunFacts, keys: Sequence[str]) -> dict[str, Any]:
    prints = facts.section("fingerprints")
    return {key: prints[key] for key in keys if key in prints}


def _differ(values: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether two of them have different values under the same key."""
    return any(one[key] != other[key] for one in values for other in values for key in one.keys() & other.keys())


def _columns() -> list[Column]:
    def of_fidelity(key: str, about: str) -> Column:
        metric = BY_KEY[key]
        return Column(
            metric.name,
            metric.unit,
            metric.better,
            metric.form,
            lambda facts: facts.of("fidelity", "student").get(key),
            about,
            lambda facts: facts.of("fidelity", "student").get("intervals", {}).get(key),
        )

    return [
        Column("parameters", "", "", count, lambda facts: facts.section("parameters").get("student")),
        of_fidelity("kl", "text teacher vocabulary"),
        of_fidelity("top1_agreement", "text teacher vocabulary"),
        of_fidelity("acceptance", "text teacher vocabulary"),
        of_fidelity("nll", "text vocabulary"),
        Column("recovery", "of the margin", "higher", share, _recovery, "teacher"),
        Column(
            "decode",
            "tokens/s",
            "higher",
            rate,
            lambda f: f.of("cost", "student").get("decode", {}).get("1"),
            "machine",
        ),
        Column("on disk", "", "lower", size, lambda facts: facts.of("cost", "student").get("bytes_on_disk")),
        Column("training", "wall time", "lower", duration, _training_seconds, "machine"),
    ]


def _recovery(facts: RunFacts) -> float | None:
    found = mean_recovery(facts.section("benchmarks"), "student")
    return found.recovery if found and found.clear else None


def _training_seconds(facts: RunFacts) -> float | None:
    seconds = [line["seconds"] for line in facts.costs if line["phase"] == "train-student"]
    return sum(seconds) if seconds else None


def _figures_section(runs: Sequence[RunFacts], names: Sequence[str], unlike: Mapping[str, str]) -> Iterator[Section]:
    columns = [column for column in _columns() if any(column.value(facts) is not None for facts in runs)]
    if not columns:
        return
    best = {column.name: _best(column, runs, unlike) for column in columns}
    rows = []
    for index, (facts, name) in enumerate(zip(runs, names, strict=True)):
        row = [Cell(name, role=_role(index))]
        for column in columns:
            value, ends = column.value(facts), column.ends(facts)
            small = "" if ends is None else interval(ends, column.form)
            is_best = value is not None and value == best[column.name]
            cell = Cell("–") if value is None else Cell(column.form(value), value, small, tuple(ends or ()), is_best)
            row.append(cell)
        rows.append(row)
    head = [
        Cell("student of"),
        *(Cell(with_arrow(column.name, column.better), small=column.small) for column in columns),
    ]
    yield Section(
        "figures",
        "Key figures of the students",
        [
            Table(head, rows),
            Note(f"{ARROWS_MEAN} Ranges are 95 % intervals; where they overlap, the order may be chance."),
        ],
    )


def _best(column: Column, runs: Sequence[RunFacts], unlike: Mapping[str, str]) -> float | None:
    values = [value for facts in runs if (value := column.value(facts)) is not None and math.isfinite(value)]
    if (
        not column.better
        or len(values) < 2
        or len(set(values)) < 2
        or any(word in unlike for word in column.about.split())
    ):
        return None
    return min(values) if column.better == "lower" else max(values)


def _role(index: int) -> str:
    return f"r{index % COLOURS}"


def _verdict(runs: Sequence[RunFacts], names: Sequence[str], unlike: Mapping[str, str]) -> str:
    """Return a sentence that names the student closest to the teacher, if the runs can be ranked."""
    measured = [(facts.of("fidelity", "student"), name) for facts, name in zip(runs, names, strict=True)]
    found = sorted(((each["kl"], name, each) for each, name in measured if "kl" in each), key=lambda each: each[0])
    if len(found) < 2 or unlike.keys() & {"text", "teacher", "vocabulary"}:
        return "No one figure ranks these runs."
    (least, first, best), (following, second, other) = found[:2]
    text = (
        f"Of {len(found)} students, that of {first} keeps closest to the teacher: KL {nats(least)} nats/token, against"
    )
    text += f" {nats(following)} in {second}"
    if len(found) > 2:
        text += (
            f" and {nats(found[-1][0])} in {found[-1][1]}"
            if len(found) == 3
            else f" … {nats(found[-1][0])} in {found[-1][1]}"
        )
    ends, others = best.get("intervals", {}).get("kl"), other.get("intervals", {}).get("kl")
    close = ends and others and ends[1] >= others[0]
    return (
        f"{text}; the first two may be in this order by chance, since their 95 % intervals overlap."
        if close
        else f"{text}."
    )


def _curve_section(runs: Sequence[RunFacts], names: Sequence[str]) -> Iterator[Section]:
    named = [
        (name, _role(i), facts.curves.get("student", {}))
        for i, (facts, name) in enumerate(zip(runs, names, strict=True))
    ]
    qualifiers = [training_kl(facts.section("experiment")) for facts in runs]
    if charts := curve_charts(named, qualifiers):
        yield Section("training", "Training", [Charts(charts)])


def _benchmark_section(runs: Sequence[RunFacts], names: Sequence[str]) -> Iterator[Section]:
    """Yield bars of a task together only if it is the same one: same metric, documents and chance."""
    kinds: dict[tuple[Any, ...], dict[int, Mapping[str, Any]]] = {}
    for index, facts in enumerate(runs):
        for task, result in facts.of("benchmarks", "student").items():
            if "value" in score(result):
                key = (task, result["metric"], result.get("documents"), result.get("chance"))
                kinds.setdefault(key, {})[index] = result
    if not kinds:
        return
    groups, rows = [], []
    for (task, metric, documents, chance), results in sorted(kinds.items(), key=str):
        said = metric + (f", {number(documents)} documents" if documents is not None else "")
        rows.append([Cell(task, small=said), *(score_cell(results.get(index)) for index in range(len(runs)))])
        if all(0 <= score(result)["value"] <= 1 for result in results.values()):
            bars = [bar(names[index], _role(index), result) for index, result in results.items()]
            groups.append(Group(f"{task}, {metric}", bars, chance, "" if chance is None else f"chance {share(chance)}"))
    contents: list[Content] = []
    contents += score_charts(groups, "Benchmark scores of the runs")
    contents.append(Table([Cell("benchmark"), *(Cell(name, role=_role(i)) for i, name in enumerate(names))], rows))
    yield Section("benchmarks", "Benchmarks", contents)


def _difference_section(runs: Sequence[RunFacts], names: Sequence[str]) -> Iterator[Section]:
    known = [(index, facts) for index, facts in enumerate(runs) if facts.section("experiment")]
    if len(known) < 2:
        return
    flats = [flat(facts.section("experiment")) for _, facts in known]
    keys = [key for key in dict.fromkeys(key for each in flats for key in each) if key != "run_dir"]
    missing = object()
    rows = [
        [Cell(key), *(Cell(plain(each[key]) if key in each else "–") for each in flats)]
        for key in keys
        if any(each.get(key, missing) != flats[0].get(key, missing) for each in flats)
    ]
    if rows:
        head = [Cell("key"), *(Cell(names[index], role=_role(index)) for index, _ in known)]
        content: Content = Table(head, rows, wraps=True)
    else:
        content = Note("Nothing: their experiment files are the same.")
    yield Section("differences", "What their experiments differ in", [content])
