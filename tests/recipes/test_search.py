"""A student by size: candidates are tried from the cache, the best one is trained, and nothing is tried twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")

SEARCH = ("--student.options", "{}", "--student.search", "{parameters: 48k, steps: 2}")


@pytest.fixture
def searched(train: Any, tmp_path: Path) -> tuple[Any, dict[str, Any], Path]:
    outcome = train(*SEARCH, "--train.max_steps", 3).done()
    return outcome, json.loads((tmp_path / "run" / "search.json").read_text()), tmp_path / "run"


def test_the_better_half_goes_on_and_the_best_is_trained(
    searched: tuple[Any, dict[str, Any], Path], train: Any
) -> None:
    outcome, found, run = searched
    tried = found["candidates"]
    assert len({json.dumps(one["options"]) for one in tried}) == len(tried) == 3
    assert all(0 < one["parameters"] <= 48_000 for one in tried)
    first = sorted(tried, key=lambda one: one["kl"]["2"])
    second = sorted(first[:2], key=lambda one: one["kl"]["4"])
    assert [len(one["kl"]) for one in first] == [2, 2, 1]
    assert found["chosen"] == second[0]["options"]
    config = json.loads((run / "student" / "config.json").read_text())
    names = {"layers": "num_hidden_layers", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size"}
    for name, size in found["chosen"].items():
        assert name not in names or config[names[name]] == size
    assert "search: the best is" in outcome.out
    again = train(*SEARCH, "--train.max_steps", 3).done()
    assert "search" not in again.out and "nothing to do" in again.out
    train("--student.options", "{}", "--student.search", "{share: 0.5}").refused("search.json", "another student")


def test_a_search_that_was_stopped_goes_on_where_it_was(searched: tuple[Any, dict[str, Any], Path], train: Any) -> None:
    _, found, run = searched
    left = json.loads(json.dumps(found)) | {"chosen": None}
    left["candidates"][1]["kl"] = {}
    for name in ("student", "checkpoints"):
        (run / name).rename(run.parent / name)
    (run / "search.json").write_text(json.dumps(left))
    train(*SEARCH, "--train.max_steps", 3).done()
    assert json.loads((run / "search.json").read_text()) == found


def test_a_pruned_student_without_sizes_is_searched_for(
    distill: Any, make_teacher: Any, world: Any, tmp_path: Path
) -> None:
    teacher = {"model": make_teacher("llama", num_hidden_layers=8, intermediate_size=256)}
    file = world.write(tmp_path / "experiment.yaml", teacher=teacher, student={"options": {"calibration_samples": 4}})
    planned = distill("plan", file).done()
    assert "student.search: 6 candidates" in planned.out


OWN = """
from students.compact import CompactDecoder
from distill.models.shapes import declare


def sizes(parameters: int, count: int, vocab_size: int):
    return [{"layers": layers, "hidden_size": 16, "heads": 2} for layers in (2, 1)][:count]


@declare(candidates=sizes, sizes=("layers", "hidden_size", "heads"))
class Own(CompactDecoder):
    pass
"""


def test_a_class_of_the_users_own_declares_its_candidates(train: Any, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    own = ("--student.class_path", f"{tmp_path / 'own.py'}:Own", "--student.options", "{}")
    train(*own, "--student.search", "{parameters: 9k, steps: 2}", "--train.max_steps", 2).done()
    found = json.loads((tmp_path / "run" / "search.json").read_text())
    assert [one["options"]["layers"] for one in found["candidates"]] == [2, 1] and found["chosen"] is not None


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ("{size: 60M}", ("unknown key 'size'", "known: candidates, parameters, share, steps")),
        ("{candidates: 3}", ("give parameters", "or share")),
        ("{share: 0.4, parameters: 60M}", ("one of them",)),
        ("{share: 1.5}", ("student.search.share", "between 0 and 1")),
        ("{share: .nan}", ("student.search.share",)),
        ("{parameters: sixty}", ("student.search.parameters", "such as 60M")),
        ("{parameters: -1}", ("student.search.parameters",)),
        ("{parameters: 100}", ("no student of 100 parameters",)),
        ("{share: 0.4, candidates: 0}", ("student.search.candidates", "from 1 to 64")),
        ("{share: 0.4, steps: 2.5}", ("student.search.steps", "whole number")),
    ],
)
def test_a_wrong_search_is_refused(search: str, words: tuple[str, ...], train: Any) -> None:
    train("--student.options", "{}", "--student.search", search).refused(*words)


def test_sizes_beside_a_search_are_refused(train: Any) -> None:
    train("--student.search", "{share: 0.4}").refused("student.options: layers", "give one of the two")


def test_a_class_without_candidates_is_refused(train: Any) -> None:
    compact = ("--student.class_path", "compact", "--student.options", "{}", "--student.search", "{share: 0.4}")
    train(*compact).refused("compact declares no candidates", "student.options")
