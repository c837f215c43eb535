"""The page has every figure that was measured, nothing that was not, and no markup that a model or a name brought."""

from __future__ import annotations

import html
import html.parser
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.errors import UserError
from distill.report.corpus import source_tables
from distill.report.facts import RunFacts
from distill.report.markdown import text
from distill.report.page import run_page, write_report

SECTIONS = ("figures", "training", "where", "benchmarks", "speed", "texts", "cost", "forecast", "seeds", "setup")


class Reader(html.parser.HTMLParser):
    """Tags, exact values and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.values: set[str] = set()
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "data-value":
                self.values |= set((value or "").split())
            if name in ("src", "href", "xlink:href", "action", "srcset"):
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def figures(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from figures(each)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def test_every_figure_stands_there_exactly(fake_run: Callable[..., Path]) -> None:
    page, card = write_report(fake_run())
    assert (page.name, card.name) == ("report.html", "report.md")
    content = json.loads((page.parent / "evaluation.json").read_text())
    del content["experiment"]  # which stands there as a file
    shown = Reader(page.read_text(encoding="utf-8")).values
    assert {repr(value) for value in figures(content)} - shown == set()
    assert f"{content['fidelity']['student']['kl']:.3f}" in page.read_text(encoding="utf-8")
    assert f"{content['fidelity']['student']['kl']:.3f}" in card.read_text(encoding="utf-8")


def test_every_count_of_a_source_stands_there_exactly() -> None:
    counts = {"rows": 31, "documents": 29, "held_out": 3, "tokens": 221834, "learned": 221805, "longer": 28}
    tables = source_tables({"speeches": {**counts, "left_out": {"empty": 2}}})
    shown = {cell.value for table in tables for row in table.rows for cell in row}
    assert set(figures(counts)) | {2} <= shown


def test_tables_of_card_and_page_are_the_same(fake_run: Callable[..., Path]) -> None:
    facts = RunFacts.read(fake_run())
    _, card = write_report(facts.run)
    lines = card.read_text(encoding="utf-8").splitlines()
    tables = [each for section in run_page(facts).sections for each in section.contents if each.kind == "table"]
    rows = [row for table in tables for row in table.rows]  # type: ignore[union-attr]
    assert len(rows) > 60
    found = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("| ")]
    assert len(found) == len(rows) + len(tables)
    for row in rows:
        cells = [text(cell.text) + (f" ({text(cell.small)})" if cell.small and cell.text else "") for cell in row]
        assert cells in found


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("figures", ["fidelity", "parameters", "student_against_control"]),
        ("where", ["fidelity"]),
        ("benchmarks", ["benchmarks"]),
        ("speed", ["cost"]),
        ("texts", ["texts"]),
        ("seeds", ["seeds"]),
        ("setup", ["experiment", "versions", "machine", "fingerprints"]),
    ],
)
def test_what_is_absent_leaves_no_heading(fake_run: Callable[..., Path], section: str, keys: list[str]) -> None:
    run = fake_run(change=lambda content: [content.pop(key) for key in keys])
    page, card = write_report(run)
    content = page.read_text(encoding="utf-8")
    assert f'id="{section}"' not in content
    assert content.count("<h2") == len(re.findall("^## ", card.read_text(encoding="utf-8"), re.MULTILINE))
    assert re.search(r"</h2>\s*</section>", content) is None


def test_sections_stand_in_the_readers_order(fake_run: Callable[..., Path]) -> None:
    assert tuple(section.id for section in run_page(RunFacts.read(fake_run())).sections) == SECTIONS


def test_only_logs(fake_run: Callable[..., Path]) -> None:
    run = fake_run(costs=None, forecast=None)
    (run / "evaluation.json").unlink()
    page, _ = write_report(run)
    assert [section.id for section in run_page(RunFacts.read(run)).sections] == ["training"]
    assert "Not measured yet" in page.read_text(encoding="utf-8")


def test_what_was_predicted_stands_beside_what_came(fake_run: Callable[..., Path]) -> None:
    run = fake_run()
    ends = {"1": {"kl": 1.25, "low": 1.125, "high": 1.5}, "10": {"kl": 0.75, "low": 0.5, "high": 1.0}}
    file = run / "logs/student/prediction.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"steps": 10, "points": [[0, 3.0]], "predicted": {"0.1": ends}, "end": 1.3125}))
    found = next(section for section in run_page(RunFacts.read(run)).sections if section.id == "training").contents[-1]
    assert [cell.value for cell in found.rows[0]] == [None, 1.25, None, 0.75, 1.3125]  # type: ignore[union-attr]
    assert found.rows[0][1].small_values == (1.125, 1.5)  # type: ignore[union-attr]
    file.write_text('{"predicted": {"0.1": {"1": {"kl": 1}}}}')
    with pytest.raises(UserError, match=r"prediction\.json"):
        write_report(run)


def test_the_students_that_were_tried_stand_best_first_and_strange_sizes_are_text(
    fake_run: Callable[..., Path],
) -> None:
    run = fake_run()
    tried = [
        {"options": {"layers": 8}, "parameters": 57_000_000, "kl": {"10": 4.0}},
        {"options": {"layers": 13, EVIL: EVIL}, "parameters": 56_000_000, "kl": {"10": 3.0, "20": 1.25}},
        {"options": {"layers": 20}, "parameters": 55_000_000, "kl": {"10": 2.0, "20": 1.5}},
    ]
    (run / "search.json").write_text(json.dumps({"asked": {}, "candidates": tried, "chosen": tried[1]["options"]}))
    page, _ = write_report(run)
    found = next(section for section in run_page(RunFacts.read(run)).sections if section.id == "search").contents[0]
    assert [row[1].value for row in found.rows] == [56_000_000, 55_000_000, 57_000_000]  # type: ignore[union-attr]
    assert found.rows[0][3].best and not found.rows[1][3].best  # type: ignore[union-attr]
    assert EVIL not in page.read_text(encoding="utf-8")
    (run / "search.json").write_text('{"candidates": [{"options": 3}]}')
    with pytest.raises(UserError, match=r"search\.json"):
        write_report(run)


EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def evil(content: dict[str, Any]) -> None:
    """Markup wherever words come from elsewhere."""
    for key in ("prompts", "truth", "teacher", "student", "control"):
        content["texts"][key] = [EVIL, "```\n# heading\n</details>" + EVIL]
    content["experiment"]["teacher"]["model"] = EVIL
    content["machine"]["processor"] = EVIL
    content["versions"][EVIL] = EVIL
    content["fingerprints"]["corpus"] = EVIL
    for model in content["benchmarks"]:
        content["benchmarks"][model][EVIL] = content["benchmarks"][model].pop("piqa")


def test_markup_from_elsewhere_is_text(fake_run: Callable[..., Path]) -> None:
    page, card = write_report(fake_run(EVIL.replace("/", ""), evil))
    reader = Reader(page.read_text(encoding="utf-8"))
    assert not {"script", "img"} & set(reader.tags)
    assert "".join(reader.words).count(EVIL) >= 10
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", card.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in outside and "<img" not in outside
    assert outside.count("<details>") == outside.count("</details>")


def test_the_page_needs_nothing_else(fake_run: Callable[..., Path]) -> None:
    page, _ = write_report(fake_run())
    content = page.read_text(encoding="utf-8")
    reader = Reader(content)
    assert "script" not in reader.tags and "@import" not in content and "url(" not in content
    assert all(link.startswith("#") or link == "data:," for link in reader.links), reader.links
    assert "default-src 'none'" in html.unescape(content)


def test_writing_again_writes_the_same(fake_run: Callable[..., Path]) -> None:
    run = fake_run()
    first = [path.read_bytes() for path in write_report(run)]
    assert [path.read_bytes() for path in write_report(run)] == first
    assert not list(run.glob("*.tmp"))


def test_a_perplexity_that_no_float_can_hold_is_a_dash(fake_run: Callable[..., Path]) -> None:
    def change(content: dict[str, Any]) -> None:
        del content["fidelity"]["before"]["perplexity"], content["fidelity"]["before"]["intervals"]["perplexity"]

    _, card = write_report(fake_run(change=change))
    lines = card.read_text(encoding="utf-8").splitlines()
    row = next(line for line in lines if line.startswith("| perplexity"))
    assert [cell.strip() == "–" for cell in row.split("|")[2:6]] == [False, True, False, False]


def test_a_damaged_evaluation_leaves_the_old_page(fake_run: Callable[..., Path]) -> None:
    run = fake_run()
    page, _ = write_report(run)
    before = page.read_bytes()
    (run / "evaluation.json").write_text('{"fidelity": 3}')
    with pytest.raises(UserError):
        write_report(run)
    assert page.read_bytes() == before


def test_energy_and_failures_are_said(fake_run: Callable[..., Path]) -> None:
    page, _ = write_report(fake_run())
    words = "".join(Reader(page.read_text(encoding="utf-8")).words).replace("\xa0", " ")
    assert "not measured" in words and "2.26 Wh" in words and "1 of 2 starts" in words and "1 interrupted" in words
    assert "4 min 22 s" in words  # both starts of the training


def test_out_of_memory_is_said(fake_run: Callable[..., Path]) -> None:
    page, _ = write_report(fake_run(change=lambda content: content["cost"]["teacher"]["decode"].update({"8": None})))
    assert "out of memory" in page.read_text(encoding="utf-8")


def test_an_empty_bin_keeps_its_place(fake_run: Callable[..., Path]) -> None:
    def change(content: dict[str, Any]) -> None:
        for model in content["fidelity"].values():
            del model["by_position"][1]

    page, _ = write_report(fake_run(change=change))
    charts = re.findall(r"<svg.*?</svg>", page.read_text(encoding="utf-8"), re.DOTALL)
    by_position = [chart for chart in charts if "by position" in chart]
    assert len(by_position) == 2
    assert all(f">{edge}</text>" in by_position[0] for edge in (0, 4, 16, 64, 256))
    assert by_position[0].count("<circle") == 6  # three bins of two models
