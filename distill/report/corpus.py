"""The text on the page: what was read of each source, what was left out and why, and how each source is learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from distill.report.contents import Cell, Content, Section, Table
from distill.report.facts import RunFacts
from distill.report.fidelity import figure
from distill.report.metrics import BY_KEY, MODELS, model_name
from distill.report.numbers import number, share

_NUMBERS = ("rows", "documents", "held_out", "tokens")


def corpus_section(facts: RunFacts) -> Iterator[Section]:
    """Yield the counts of each source, and the fidelity on the held-out text of each if there are several."""
    sources = facts.section("corpus").get("sources", {})
    if sources:
        yield Section("text", "The text", [*source_tables(sources), *_fidelity_by_source(facts)])


def source_tables(sources: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Return the counts of each source (`SourceCounts.figures`) by name, and the reasons for what was left out."""
    head = [*map(Cell, ("source", "rows", "documents", "held out", "tokens", "learned", "longer than a sample"))]
    rows = []
    for name, found in sources.items():
        learned = _count(found.get("learned"))
        if found.get("tokens"):
            learned = replace(learned, small=share(found.get("learned", 0) / found["tokens"]))
        cells = [_count(found.get(key)) for key in _NUMBERS]
        rows.append([Cell(name), *cells, learned, _count(found.get("longer"))])
    tables = [Table(head, rows)]
    reasons = [
        [Cell(reason, small=name if len(sources) > 1 else ""), _count(count)]
        for name, found in sources.items()
        for reason, count in found.get("left_out", {}).items()
    ]
    if reasons:
        tables.append(Table([Cell("left out"), Cell("rows")], reasons))
    return tables


def _fidelity_by_source(facts: RunFacts) -> Iterator[Content]:
    found = {model: entries for model in MODELS if (entries := facts.of("fidelity", model).get("by_source"))}
    if not found:
        return
    keys = [key for key in ("nll", "kl", "top1_agreement", "acceptance") if _is_measured(found.values(), key)]
    head = [Cell("held-out text of"), Cell("model"), Cell("tokens")]
    head += [Cell(BY_KEY[key].name, small=BY_KEY[key].unit) for key in keys]
    rows = [
        [
            Cell(each["source"]),
            Cell(model_name(model), role=model),
            _count(each["positions"]),
            *(figure(each, BY_KEY[key]) for key in keys),
        ]
        for model, entries in found.items()
        for each in entries
    ]
    rows.sort(key=lambda row: row[0].text)
    yield Table(head, rows, caption="Each source apart")


def _is_measured(found: Any, key: str) -> bool:
    return any(key in each for entries in found for each in entries)


def _count(value: float | None) -> Cell:
    return Cell("–") if value is None else Cell(number(value), value)
