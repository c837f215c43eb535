"""The nearest names in a user's error message."""

from __future__ import annotations

from pathlib import Path

from distill.errors import did_you_mean, nearest, nearest_path


def test_the_nearest_name_is_asked_for_and_all_are_told() -> None:
    assert did_you_mean("fisrt", ["second", "first"]) == "; did you mean 'first'? (known: first, second)"
    assert did_you_mean("xyz", ["second", "first"]) == " (known: first, second)"


def test_several_names_may_be_near() -> None:
    known = ["arc_easy", "arc_easy_2", "mmlu"]
    assert nearest("arc_esy", known, most=3) == "; did you mean 'arc_easy' or 'arc_easy_2'?"
    assert nearest("arc_esy", known) == "; did you mean 'arc_easy'?"
    assert nearest("arc_esy", known, cutoff=0.99) == ""


def test_the_nearest_path_stands_beside_the_first_part_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/text.jsonl").touch()
    assert nearest_path(tmp_path / "dta/text.jsonl", cutoff=0.5) == f"; did you mean '{tmp_path / 'data'}'?"
    assert nearest_path(tmp_path / "data/text.json", 0.5) == f"; did you mean '{tmp_path / 'data/text.jsonl'}'?"
    assert nearest_path(tmp_path / "data/text.json", 0.5, suits=Path.is_dir) == ""
    assert nearest_path(tmp_path / "data/text.jsonl/deeper", cutoff=0.5) == ""
