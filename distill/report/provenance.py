"""Costs of a run, forecasts, spread over seeds, and origins: the page's last sections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from distill.report.contents import Cell, Content, Listing, Section, Table
from distill.report.facts import RunFacts
from distill.report.metrics import BY_KEY, MODELS
from distill.report.numbers import SPACE, duration, energy, number, share, size, with_sign

NOT_MEASURED = Cell("not measured")


def cost_section(facts: RunFacts) -> Iterator[Section]:
    """Yield time, memory and energy of each phase, over all its starts."""
    if not facts.costs:
        return
    phases = list(dict.fromkeys(line["phase"] for line in facts.costs))
    on_device = any("peak_device_bytes" in line for line in facts.costs)
    rows = [_cost_row(phase, [line for line in facts.costs if line["phase"] == phase], on_device) for phase in phases]
    if len(phases) > 1:
        rows.append(_cost_row("all", list(facts.costs), on_device))
    head = [Cell("phase"), Cell("time"), Cell("starts"), Cell("peak memory")]
    head += [Cell("peak memory", small="of the card")] if on_device else []
    head.append(Cell("energy"))
    yield Section("cost", "What it cost", [Table(head, rows)])


def search_section(facts: RunFacts) -> Iterator[Section]:
    """Yield the students that a search compared, the chosen one first."""
    candidates = facts.search.get("candidates", [])
    if len(candidates) < 2:
        return
    steps = sorted({steps for one in candidates for steps in one["kl"]}, key=int)
    best_first = sorted(candidates, key=lambda one: [one["kl"].get(each, float("inf")) for each in reversed(steps)])
    rows = [
        [
            Cell(", ".join(f"{name} {value}" for name, value in one["options"].items())),
            Cell(f"{one['parameters'] / 1e6:.1f} M", one["parameters"]),
            *(_kl_cell(one["kl"].get(each), one["options"] == facts.search.get("chosen")) for each in steps),
        ]
        for one in best_first
    ]
    head = [Cell("sizes"), Cell("parameters"), *(Cell("held-out KL", small=f"after {each} steps") for each in steps)]
    yield Section("search", "The students that were tried", [Table(head, rows)])


def _kl_cell(kl: float | None, is_chosen: bool) -> Cell:
    return Cell("") if kl is None else Cell(f"{kl:.3f}", kl, best=is_chosen)


def _cost_row(phase: str, lines: list[Mapping[str, Any]], on_device: bool) -> list[Cell]:
    seconds = sum(line["seconds"] for line in lines)
    broken = [line["ended"] for line in lines if line.get("ended", "done") != "done"]
    stops = ", ".join(f"{broken.count(word)} {word}" for word in dict.fromkeys(broken))
    return [
        Cell(phase),
        Cell(duration(seconds), seconds),
        Cell(number(len(lines)), len(lines), stops),
        _largest(lines, "peak_memory_bytes"),
        *([_largest(lines, "peak_device_bytes")] if on_device else []),
        _energy(lines),
    ]


def _largest(lines: list[Mapping[str, Any]], key: str) -> Cell:
    values = [line[key] for line in lines if key in line]
    return Cell(size(max(values)), max(values)) if values else NOT_MEASURED


def _energy(lines: list[Mapping[str, Any]]) -> Cell:
    known = [line for line in lines if "joules" in line]
    if not known:
        return NOT_MEASURED
    joules = sum(line["joules"] for line in known)
    sources = {"nvml": "the card alone", "rapl": "the processor alone"}
    names = dict.fromkeys(line["energy_source"] for line in known if "energy_source" in line)
    small = [", ".join(sources.get(name, name) for name in names)] if names else []
    if len(known) < len(lines):
        small.append(f"{len(known)} of {len(lines)} starts")
    return Cell(energy(joules), joules, "; ".join(small))


def forecast_section(facts: RunFacts) -> Iterator[Section]:
    """Yield the forecast beside the measurement."""
    rows = []
    for row in facts.forecast:
        form = {"bytes": size, "s": duration}.get(row["unit"], lambda v, unit=row["unit"]: f"{number(v)}{SPACE}{unit}")
        forecast, measured = row.get("forecast"), row.get("measured")
        off = forecast / measured - 1 if forecast is not None and measured else None
        rows.append(
            [
                Cell(row["what"]),
                Cell("–") if forecast is None else Cell(form(forecast), forecast),
                NOT_MEASURED if measured is None else Cell(form(measured), measured),
                Cell("–") if off is None else Cell(with_sign(share(off)), off),
            ]
        )
    if rows:
        head = [Cell(text) for text in ("", "forecast", "measured", "forecast is off by")]
        yield Section("forecast", "Forecast and measured", [Table(head, rows)])


def seed_section(facts: RunFacts) -> Iterator[Section]:
    """Yield mean and deviation over trainings with different seeds."""
    found = facts.section("seeds")
    models = [model for model in MODELS if found.get(model)]
    keys = list(dict.fromkeys(key for model in models for key in found[model]))
    if not keys:
        return
    keys = [key for key in BY_KEY if key in keys] + [key for key in keys if key not in BY_KEY]
    rows = []
    for key in keys:
        name = BY_KEY[key].name if key in BY_KEY else key
        form = BY_KEY[key].form if key in BY_KEY else number
        row = [Cell(name, small=BY_KEY[key].unit if key in BY_KEY else "benchmark")]
        for model in models:
            spread = found[model].get(key)
            if spread is None:
                row += [Cell("–"), Cell("–")]
                continue
            values = spread["values"]
            small, exact = (
                (f"± {form(spread['deviation'])}", (spread["deviation"],)) if "deviation" in spread else ("", ())
            )
            row.append(Cell(form(spread["mean"]), spread["mean"], small, exact))
            row.append(Cell(" · ".join(form(value) for value in values), None, "", tuple(values)))
        rows.append(row)
    head = [Cell("over seeds")]
    for model in models:
        head += [Cell(model, small="mean ± deviation", role=model), Cell("each seed", role=model)]
    yield Section("seeds", "Other seeds", [Table(head, rows)])


def setup_section(facts: RunFacts) -> Iterator[Section]:
    """Yield everything needed to repeat the run: the experiment file, versions, machine and fingerprints."""
    contents: list[Content] = []
    if experiment := facts.section("experiment"):
        text = yaml.safe_dump(dict(experiment), sort_keys=False, allow_unicode=True, width=100)
        contents.append(Listing("The experiment file, with every default", text, "yaml"))
    if machine := facts.section("machine"):
        contents.append(_facts_table("Machine", machine))
    if versions := facts.section("versions"):
        contents.append(_facts_table("Versions", versions))
    if fingerprints := facts.section("fingerprints"):
        contents.append(_facts_table("Fingerprints", fingerprints))
    if contents:
        yield Section("setup", "To do it again", contents)


def _facts_table(name: str, content: Mapping[str, Any]) -> Table:
    rows = []
    for key, value in flat(content).items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        text = size(value) if is_number and key.endswith("bytes") else number(value) if is_number else plain(value)
        rows.append([Cell(key.removesuffix("_bytes").replace("_", " ")), Cell(text, value if is_number else None)])
    return Table([Cell(name.lower()), Cell("")], rows, summary=name, wraps=True)


def flat(content: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return nested keys as dotted ones. An empty object is a value."""
    result: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{above}{key}"
        result |= flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return result


def plain(value: Any) -> str:
    """Return a value of the experiment file as it is written there, on one line."""
    if isinstance(value, str):
        return value
    return (
        str(yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True))
        .removesuffix("...\n")
        .strip()
    )
