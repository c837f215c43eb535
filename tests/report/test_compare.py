"""Several runs on one page: the best is marked where that is fair, and only what differs is listed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.errors import UserError
from distill.report.compare import compare, compare_page, distinct_names
from distill.report.contents import Charts, Page, Table
from distill.report.facts import RunFacts


@pytest.fixture
def page_of(fake_run: Callable[..., Path]) -> Callable[..., Page]:
    """The page of two runs, the second with larger distances and a changed evaluation."""

    def make(change: Callable[[dict[str, Any]], object] | None = None) -> Page:
        return compare_page([RunFacts.read(fake_run("one")), RunFacts.read(fake_run("two", change, 0.4))])

    return make


def table(page: Page, section: str) -> Table:
    return next(b for s in page.sections if s.id == section for b in s.contents if isinstance(b, Table))


def best(page: Page) -> set[tuple[str, str]]:
    found = table(page, "figures")
    return {
        (row[0].text, head.text.split()[0])
        for row in found.rows
        for head, cell in zip(found.head, row, strict=True)
        if cell.best
    }


def test_the_best_is_marked(page_of: Callable[..., Page]) -> None:
    page = page_of()
    marked = best(page)
    assert {("one", "KL"), ("one", "top-1"), ("one", "acceptance"), ("one", "NLL"), ("one", "recovery")} <= marked
    assert not any(column in ("parameters", "decode", "on") for _, column in marked)  # equal in both
    assert page.warnings == []
    assert page.verdict.startswith(
        "Of 2 students, that of one keeps closest to the teacher: KL 3.174 nats/token, against 3.574"
    )


def test_intervals_that_overlap_are_said(fake_run: Callable[..., Path]) -> None:
    runs = [RunFacts.read(fake_run("one")), RunFacts.read(fake_run("two", None, 0.05))]
    assert "by chance" in compare_page(runs).verdict


@pytest.mark.parametrize("change", [{"text": {"tokens": 4081}}, {"fingerprints": {"corpus": "another"}}])
def test_different_text_is_said_and_nothing_of_it_marked(page_of: Callable[..., Page], change: dict[str, Any]) -> None:
    page = page_of(lambda content: [content[key].update(value) for key, value in change.items()])
    assert any("different held-out text" in warning for warning in page.warnings)
    assert not {column for _, column in best(page)} & {"KL", "top-1", "acceptance", "NLL"}
    assert page.verdict == "No one figure ranks these runs."


def test_different_teachers_and_machines_are_said(page_of: Callable[..., Page]) -> None:
    def change(content: dict[str, Any]) -> None:
        content["fingerprints"]["teacher_weights"] = "another"
        content["machine"]["device"] = "a card"
        content["cost"]["student"]["decode"]["1"] = 999.0

    page = page_of(change)
    assert ["different teachers" in w or "different machines" in w for w in page.warnings] == [True, True]
    columns = {column for _, column in best(page)}
    assert "NLL" in columns and not columns & {"KL", "decode", "training"}


def test_only_differing_keys_are_listed(page_of: Callable[..., Page]) -> None:
    def change(content: dict[str, Any]) -> None:
        content["experiment"]["loss"]["alpha"] = 0.3
        content["experiment"]["cache"]["entries"] = 16
        content["experiment"]["run_dir"] = "runs/two"

    found = table(page_of(change), "differences")
    assert [[cell.text for cell in row] for row in found.rows] == [
        ["loss.alpha", "0.0", "0.3"],
        ["cache.entries", "–", "16"],
    ]


def test_the_same_experiments_are_said_to_be(page_of: Callable[..., Page]) -> None:
    page = page_of()
    assert [section.contents[0].text for section in page.sections if section.id == "differences"] == [
        "Nothing: their experiment files are the same."
    ]


def test_a_task_of_other_documents_stands_apart(page_of: Callable[..., Page]) -> None:
    page = page_of(lambda content: content["benchmarks"]["student"]["piqa"].update(documents=50))
    names = [row[0].text for row in table(page, "benchmarks").rows]
    assert names.count("piqa") == 2 and names.count("arc_easy") == 1


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    assert distinct_names([tmp_path / "a" / "demo", tmp_path / "b" / "demo"]) == ["a/demo", "b/demo"]
    assert distinct_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]


def test_what_was_not_evaluated_is_compared_as_far_as_it_goes(fake_run: Callable[..., Path]) -> None:
    runs = [fake_run("one"), fake_run("two")]
    (runs[1] / "evaluation.json").unlink()
    content = compare(runs)
    assert "No one figure ranks these runs." in content and "Held-out KL" in content


def test_ten_runs_with_long_names_fit(fake_run: Callable[..., Path]) -> None:
    runs = [fake_run(f"a-run-with-a-very-long-name-number-{number}", None, number / 10) for number in range(10)]
    content = compare(runs)
    assert all(content.count(run.name) > 3 for run in runs)


def test_names_are_escaped(fake_run: Callable[..., Path]) -> None:
    content = compare([fake_run("<script>one"), fake_run("two")])
    assert "<script" not in content and "&lt;script&gt;one" in content


def test_fewer_than_two_runs_or_one_twice_are_refused(fake_run: Callable[..., Path]) -> None:
    run = fake_run("one")
    with pytest.raises(UserError, match="two or more"):
        compare([run])
    with pytest.raises(UserError, match="given twice"):
        compare([run, run.parent / "." / "one"])
    with pytest.raises(UserError, match="no such folder"):
        compare([run, run.parent / "none"])


def test_a_kl_over_some_of_the_tokens_is_not_ranked_beside_one_over_all(page_of: Callable[..., Page]) -> None:
    page = page_of(lambda content: content["text"].pop("dropped_mass"))
    assert any("only some of the teacher's tokens" in warning for warning in page.warnings)
    assert not {column for _, column in best(page)} & {"KL", "top-1", "acceptance", "NLL"}
    assert page.verdict == "No one figure ranks these runs."


def chart_titles(page: Page) -> list[str]:
    section = next(section for section in page.sections if section.id == "training")
    return [chart.title for content in section.contents if isinstance(content, Charts) for chart in content.charts]


def test_held_out_kls_of_two_kinds_share_no_chart(page_of: Callable[..., Page]) -> None:
    assert chart_titles(page_of()) == ["Held-out KL", "Training loss"]
    page = page_of(lambda content: content["experiment"]["cache"].update(scheme="top_k", entries=12, temperature=2.0))
    assert chart_titles(page) == [
        "Held-out KL",
        "Held-out KL at temperature 2, times its square, over the top 12 tokens and a bucket",
        "Training loss",
    ]
