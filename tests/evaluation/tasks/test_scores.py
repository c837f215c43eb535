"""Benchmarks: lm-eval's own scores, chance, limits, and groups."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("lm_eval")

from distill.errors import UserError
from distill.evaluation.benchmarks import BOOTSTRAP_ROUNDS, _finite, main_metric

pytestmark = pytest.mark.usefixtures("one_thread")
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def found(run: Run, tasks: dict[str, Any]) -> dict[str, Any]:
    return run(list(tasks))


def test_scores_are_those_of_lm_evals_own_model(
    tasks: dict[str, Any], found: dict[str, Any], world: Any, folder: Path
) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        lm = HFLM(pretrained=str(world.folder / "teacher"), device="cpu", batch_size=4)
        theirs = {
            task: simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=BOOTSTRAP_ROUNDS)["results"]
            for task in tasks
        }
    compared = 0
    for task, results in theirs.items():
        for metric, entry in found[task]["metrics"].items():
            expected, stderr = results[task][f"{metric},none"], results[task][f"{metric}_stderr,none"]
            is_share = metric in ("acc", "acc_norm", "exact_match")
            assert entry["value"] == (expected if is_share else pytest.approx(expected, rel=1e-6))
            assert entry.get("stderr", "N/A") == (stderr if stderr == "N/A" else pytest.approx(stderr, rel=1e-4))
            compared += 1
    assert compared == sum(len(task["metric_list"]) for task in tasks.values())
    assert 0 < found["answer"]["metrics"]["exact_match"]["value"] < 1


def test_what_is_shown_and_what_guessing_gives(found: dict[str, Any]) -> None:
    assert {task: entry["metric"] for task, entry in found.items()} == {
        "arc_easy": "acc_norm",
        "last_word": "acc",
        "whole_text": "word_perplexity",
        "answer": "exact_match",
    }
    assert found["arc_easy"]["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert found["last_word"]["chance"] == found["answer"]["chance"] == 0
    assert "chance" not in found["whole_text"]
    assert {entry["documents"] for entry in found.values()} == {12}
    assert set(found["arc_easy"]) == {"documents", "metric", "metrics", "chance"}
    assert json.loads(json.dumps(found)) == found


def test_the_metric_to_show() -> None:
    assert main_metric("hellaswag", ["acc", "acc_norm"]) == "acc_norm"
    assert main_metric("sciq", ["acc", "acc_norm"]) == "acc"
    assert main_metric("wikitext", ["word_perplexity", "bits_per_byte"]) == "word_perplexity"


def test_what_is_not_finite_is_left_out() -> None:
    found = {"perplexity": {"value": math.inf, "stderr": math.nan}, "acc": {"value": 0.5, "stderr": math.nan}}
    assert _finite(found) == {"acc": {"value": 0.5}}


def test_the_limit_is_kept(run: Run) -> None:
    limited = run(["arc_easy"], limit=2)["arc_easy"]
    assert limited["documents"] == 2 and limited["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    with pytest.raises(UserError, match="tasks_limit: 0"):
        run(["arc_easy"], limit=0)


def test_it_is_quiet_and_leaves_everything_as_it_was(
    run: Run, tasks: dict[str, Any], model: Any, found: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    import lm_eval.api.task

    model.train()
    random.seed(5)
    expected = random.Random(5).random()
    bar, level = lm_eval.api.task.tqdm, logging.getLogger("lm_eval").level
    again = run(list(tasks))
    assert again == found
    assert tuple(capfd.readouterr()) == ("", "")
    assert model.training and random.random() == expected
    assert (lm_eval.api.task.tqdm, logging.getLogger("lm_eval").level) == (bar, level)
    model.eval()


def test_progress_is_shown_when_there_is_a_title(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    run(["last_word"], title="student")
    assert "student: last_word: 12 of 12 requests" in capfd.readouterr().out


def test_texts_that_were_cut_are_counted(run: Run, model: Any) -> None:
    class Short(torch.nn.Module):
        max_position_embeddings = 60
        head = property(lambda self: model.head)

        def body(self, ids_BL: torch.Tensor, positions_BL: torch.Tensor) -> torch.Tensor:
            assert ids_BL.shape[1] <= 60
            return model.body(ids_BL, positions_BL)

    short = run(["last_word", "whole_text"], of=Short())
    assert 0 < short["last_word"]["truncated"] < 12
    assert "truncated" not in short["whole_text"]  # windows lose nothing


def test_a_group_has_the_score_and_the_chance_that_lm_eval_defines(
    run: Run, tasks: dict[str, Any], write_task: Any, no_own_tasks: Any, copied: Any, folder: Path, tmp_path: Path
) -> None:
    copied("arc_easy")
    rows = json.loads((folder / "documents.json").read_text())
    (tmp_path / "two.json").write_text(json.dumps([rows[0], rows[3]]))  # two choices each
    write_task(tmp_path, "small", **tasks["arc_easy"], dataset_kwargs={"file": "two.json"})
    for name, by_size in (("weighted", True), ("unweighted", False)):
        metrics = [{"metric": "acc", "aggregation": "mean", "weight_by_size": by_size}]
        content = {"group": name, "task": ["arc_easy", "small"], "aggregate_metric_list": metrics}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "loose.yaml").write_text(yaml.safe_dump({"group": "loose", "task": ["arc_easy", "small"]}))
    no_own_tasks()
    found = run(["arc_easy", "small", "weighted", "unweighted"], tmp_path)
    acc = {name: found[name]["metrics"]["acc"]["value"] for name in found}
    many = (1 / 2 + 1 / 3 + 1 / 4) / 3
    assert (found["weighted"]["documents"], found["weighted"]["metric"]) == (14, "acc")
    assert acc["weighted"] == pytest.approx((12 * acc["arc_easy"] + 2 * acc["small"]) / 14)
    assert found["weighted"]["chance"] == pytest.approx((12 * many + 2 / 2) / 14)
    assert acc["unweighted"] == pytest.approx((acc["arc_easy"] + acc["small"]) / 2)
    assert found["unweighted"]["chance"] == pytest.approx((many + 1 / 2) / 2)
    with pytest.raises(UserError, match="'loose' is 2 tasks without a score in common; name them: arc_easy, small"):
        run(["loose"], tmp_path)
