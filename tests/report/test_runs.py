"""Rows of runs: means over seeds, and differences between runs of the same seed."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from distill.report.facts import RunFacts
from distill.report.runs import as_csv, as_json, run_rows, setting_rows


@pytest.fixture
def runs(tmp_path: Path) -> list[RunFacts]:
    found = []
    for name, alpha, seed, kl in (("a", 0.0, 0, 1.0), ("b", 0.0, 1, 2.0), ("c", 0.3, 0, 1.5), ("d", 0.3, 1, 2.1)):
        folder = tmp_path / name
        folder.mkdir()
        experiment = {"loss": {"alpha": alpha}, "train": {"seed": seed}, "run_dir": name, "cache": {"dir": name}}
        fidelity = {"student": {"nll": 3.0, "kl": kl, "intervals": {"kl": [kl - 0.1, kl + 0.1]}}}
        (folder / "evaluation.json").write_text(json.dumps({"fidelity": fidelity, "experiment": experiment}))
        found.append(RunFacts.read(folder))
    return found


def test_runs_differ_in_their_settings_and_not_in_their_places(runs: list[RunFacts]) -> None:
    keys, rows = run_rows(runs, list("abcd"))
    assert keys == ["loss.alpha", "train.seed"]
    assert (rows[2]["run"], rows[2]["loss.alpha"], rows[2]["kl"], rows[2]["kl.low"]) == ("c", 0.3, 1.5, 1.4)
    assert rows[0]["acceptance"] is None


def test_seeds_are_joined_and_compared_in_pairs(runs: list[RunFacts]) -> None:
    first, second = setting_rows(*run_rows(runs, list("abcd")))
    assert (first["loss.alpha"], first["seeds"], first["kl"]) == (0.0, 2, 1.5)
    assert first["kl.deviation"] == pytest.approx(0.5**0.5) and first["kl.difference"] is None
    assert second["kl.difference"] == pytest.approx(0.3)  # of 0.5 and 0.1
    assert second["kl.difference_error"] == pytest.approx(0.2)


def test_a_setting_without_a_common_seed_has_no_difference(runs: list[RunFacts]) -> None:
    _, second = setting_rows(*run_rows([runs[0], runs[3]], ["a", "d"]))
    assert second["kl.difference"] is None and second["kl"] == 2.1


def test_the_files_say_the_same(runs: list[RunFacts]) -> None:
    keys, rows = run_rows(runs, list("abcd"))
    read = list(csv.DictReader(as_csv(rows).splitlines()))
    assert [float(row["kl"]) for row in read] == [1.0, 2.0, 1.5, 2.1] and read[0]["acceptance"] == ""
    content = json.loads(as_json(keys, rows))
    assert content["differ_in"] == keys and content["settings"][1]["seeds"] == 2
