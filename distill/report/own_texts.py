"""The models' own texts on the page: how far they lead from the teacher, how they end, and how right they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from distill.report.charts import Line, line_chart
from distill.report.contents import Cell, Chart, Charts, Content, Note, Section, Table
from distill.report.facts import RunFacts
from distill.report.fidelity import binned
from distill.report.metrics import MODELS, model_name, with_arrow
from distill.report.numbers import Format, edge, interval, nats, number, share


@dataclass(frozen=True)
class _Figure:
    key: str
    name: str
    form: Format
    meaning: str


_FIGURES = (
    _Figure("kl", with_arrow("KL on own text", "lower"), nats, "KL(model ‖ teacher), nats a token of its own text"),
    _Figure("ended", "ended", share, "texts that the model ended; the limit of tokens cut the others"),
    _Figure("repetition", with_arrow("repetition", "lower"), share, "a text's runs of 4 tokens that it has had before"),
    _Figure("distinct_1", "distinct tokens", share, "different tokens among all that were written"),
    _Figure("distinct_2", "distinct pairs", share, "different pairs of tokens among all"),
    _Figure("exact_match", with_arrow("exact match", "higher"), share, "answers that are the reference"),
    _Figure("token_f1", with_arrow("token F1", "higher"), share, "words in common with the reference"),
    _Figure("valid_json", with_arrow("valid JSON", "higher"), share, "answers that are JSON where the reference is"),
    _Figure("metric", "own metric", number, "evaluate.metric: your own, mean over the answers"),
)


_ROUNDS = (("held_out_kl", "held-out text", "student"), ("own_kl", "own texts", "control"))
"""Keys of a round's figures, their names, and the colours of their lines."""


def rounds_section(facts: RunFacts) -> Iterator[Section]:
    """Yield the KL of each round's student, on held-out text and on texts of its own."""
    rounds = facts.evaluation.get("rounds", [])
    if not rounds:
        return
    shown = [each for each in _ROUNDS if any(each[0] in one for one in rounds)]
    lines = [
        Line(name, colour, [(float(one["round"]), one[key]) for one in rounds if key in one])
        for key, name, colour in shown
    ]
    chart = line_chart(lines, "KL by rounds; the numbers are in the table below.", "round", "nats/token", nats)
    said = "On held-out text KL(teacher ‖ student), on its own KL(student ‖ teacher)."
    rows = [
        [Cell(number(one["round"]), one["round"])]
        + [Cell(nats(one[key]), one[key]) if key in one else Cell("–") for key, _, _ in shown]
        for one in rounds
    ]
    head = [Cell("round"), *(Cell(f"KL, {name}", small="nats/token") for _, name, _ in shown)]
    yield Section("rounds", "Round by round", [Charts([Chart(chart, "KL by rounds", said)]), Table(head, rows)])


def section(facts: RunFacts) -> Iterator[Section]:
    """Yield the figures of the models' own texts, and the KL by position in them beside that on held-out text."""
    found = facts.section("own_texts")
    models = [model for model in MODELS if model in found]
    if not models:
        return
    rows = []
    shown = [figure for figure in _FIGURES if any(figure.key in found[model] for model in models)]
    for figure in shown:
        cells = []
        for model in models:
            value, ends = found[model].get(figure.key), found[model].get("intervals", {}).get(figure.key)
            small = "" if ends is None else interval(ends, figure.form)
            cells.append(Cell("–") if value is None else Cell(figure.form(value), value, small, tuple(ends or ())))
        rows.append([Cell(figure.name), *cells])
    kls = [facts.of("fidelity", model).get("kl") for model in models]
    if any(kl is not None for kl in kls):
        cells = [Cell("–") if kl is None else Cell(nats(kl), kl) for kl in kls]
        rows.append([Cell("KL on held-out text", small="teacher ‖ model"), *cells])
    head = [Cell("on texts of its own"), *(Cell(model_name(model), role=model) for model in models)]
    contents: list[Content] = [Table(head, rows)]
    one = found[models[-1]]
    contents.append(
        Note(
            f"{number(one['texts'])} held-out prompts, written on from as the settings of `generate` say; brackets: "
            "95 % intervals over texts.",
            (one["texts"],),
        )
    )
    bins = {model: found[model]["by_position"] for model in models if found[model].get("by_position")}
    if chart := binned(bins, "kl", "written tokens", "tokens that it wrote before"):
        said = "A line that rises: the further from the prompt, the more its own words lead it astray."
        contents.append(Charts([Chart(chart, "KL on own text by position", said)]))
        contents.append(_bin_table(bins))
    meanings = [[Cell(figure.name), Cell(figure.meaning)] for figure in shown]
    contents.append(Table([Cell("figure"), Cell("meaning")], meanings, summary="What the figures mean", wraps=True))
    yield Section("own", "Their own texts", contents)


def _bin_table(bins: dict[str, list[dict[str, float]]]) -> Table:
    rows = []
    for model, each in bins.items():
        for one in each:
            ends = (one["from"], one["to"]) if "to" in one else (one["from"],)
            said = f"{edge(ends[0])} to {edge(ends[1])}" if len(ends) == 2 else f"from {edge(ends[0])}"
            row = [Cell(said, small_values=ends), Cell(model_name(model), role=model)]
            rows.append([*row, Cell(number(one["positions"]), one["positions"]), Cell(nats(one["kl"]), one["kl"])])
    head = [Cell("tokens before"), Cell("model"), Cell("tokens"), Cell("KL", small="nats/token")]
    return Table(head, rows, summary="All figures by position in own text")
