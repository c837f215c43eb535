"""Benchmarks through EleutherAI's lm-eval: its tasks, prompts and scores, for any model that meets our contract."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from distill.errors import UserError
from distill.evaluation.task_files import demand_lm_eval, lm_eval_alone, load_task, task_error
from distill.models.language_model import LanguageModel

LENGTH_NORMALIZED = {"hellaswag", "arc_easy", "arc_challenge", "openbookqa", "piqa"}
"""Tasks for which the field reports `acc_norm`: the choice with the highest likelihood per character is taken."""
CHOSEN = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info"}
"""Metrics of multiple choice. Guessing scores one divided by the number of choices."""
BOOTSTRAP_ROUNDS = 1000
"""Resamplings for the standard error of a perplexity. lm-eval's 100,000 take minutes; the result is within 3 % of
theirs.
"""
SEED = 1234
"""Seed of the examples in few-shot prompts, the same as lm-eval's."""


def run_tasks(
    model: LanguageModel,
    tokenizer: Any,
    tasks: list[str],
    *,
    tasks_path: str | None = None,
    limit: int | None = None,
    batch_size: int,
    vocab_size: int,
    max_length: int,
    device: torch.device,
    seed: int = SEED,
    title: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Return each task's scores: `{task: {"documents", "metric", "metrics": {name: {"value", "stderr"}}, "chance"}}`.

    `metric` is the one to show. `chance` is its value for guessing, absent if there is none. `stderr` is lm-eval's,
    absent if lm-eval has none. Values that are not finite, as a perplexity may be, are left out of `metrics`.
    `truncated` is the number of requests whose text was too long for the model and was cut from the left, absent if
    none was. A group (such as `mmlu`) has the aggregate that lm-eval defines for it.

    `limit` takes only the first documents of each task (of each task in a group). `max_length` (tokens) is the longest
    text for a model that does not say its own. Prompts are plain text, without chat template. `seed` draws few-shot
    examples and sampled texts; with lm-eval's own seed the prompts are lm-eval's. With a `title` the progress is shown.
    Nothing else is printed.

    Raises UserError if lm-eval is missing, for a tokenizer without BOS and EOS, for unknown tasks, for wrong task
    files, and for data sets that are neither on this machine nor can be fetched.
    """
    if limit is not None and limit < 1:
        raise UserError(f"evaluate.tasks_limit: {limit}; at least 1 document, or null for all")
    demand_lm_eval()
    check_tokenizer(tokenizer)
    from distill.evaluation.harness import HarnessModel

    with lm_eval_alone(seed), _evaluating(model):
        loaded = {name: load_task(name, tasks_path) for name in tasks}
        harness = HarnessModel(
            model,
            tokenizer,
            vocab_size=vocab_size,
            max_length=max_length,
            batch_size=batch_size,
            device=device,
            seed=seed,
        )
        results = {}
        for name, found in loaded.items():
            harness.title = None if title is None else f"{title}: {name}"
            results[name] = _run(harness, name, found, limit, seed)
    return results


def check_tasks(tasks: list[str], tasks_path: str | None = None) -> None:
    """Raise the UserErrors of `run_tasks` that need no model: before hours of training, not after them."""
    demand_lm_eval()
    with lm_eval_alone(SEED):
        for name in tasks:
            load_task(name, tasks_path)


def check_tokenizer(tokenizer: Any) -> None:
    """Raise UserError for a tokenizer without a token to begin a text with, which a text without context needs."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(
            "evaluate.tasks: the teacher's tokenizer has neither a BOS nor an EOS token to begin a text with: name one "
            "in its tokenizer_config.json, or leave the tasks out"
        )


def _run(harness: Any, name: str, loaded: dict[str, Any], limit: int | None, seed: int) -> dict[str, Any]:
    """Evaluate one task or group as `lm_eval.simple_evaluate` does: few-shot if the task says so, else zero-shot."""
    from lm_eval.evaluator import evaluate

    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    cut_before, harness.is_at_work = harness.cut, False
    try:
        found = evaluate(harness, loaded, limit=limit, bootstrap_iters=BOOTSTRAP_ROUNDS, log_samples=True)
    except UserError as error:
        raise UserError(f"task '{name}': {error}") from error
    except Exception as error:
        if harness.is_at_work:
            raise
        raise task_error(name, None, error) from error
    scores = found["results"][name]
    metrics = _metrics(scores)
    shown = main_metric(name, list(metrics))
    result = {"documents": scores["sample_len"], "metric": shown, "metrics": _finite(metrics)}
    chance = _chance(name, loaded, shown, found["samples"])
    cut = harness.cut - cut_before
    return result | ({} if chance is None else {"chance": chance}) | ({"truncated": cut} if cut else {})


def _metrics(scores: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return lm-eval's `{"acc,none": …, "acc_stderr,none": …}` as `{"acc": {"value", "stderr"}}`."""
    metrics: dict[str, dict[str, float]] = {}
    for key, value in scores.items():
        metric, comma, filter_ = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = scores.get(f"{metric}_stderr,{filter_}", "N/A")
        known = {} if isinstance(stderr, str) else {"stderr": float(stderr)}
        metrics[metric if filter_ == "none" else key] = {"value": float(value), **known}
    return metrics


def _finite(metrics: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the metrics without values and errors that are not finite, because JSON cannot hold them."""
    found = {
        name: {key: number for key, number in score.items() if math.isfinite(number)} for name, score in metrics.items()
    }
    return {name: score for name, score in found.items() if "value" in score}


def main_metric(task: str, metrics: list[str]) -> str:
    """Return the metric to show: `acc_norm` if the field reports it, else `acc`, else the task's first."""
    if "acc_norm" in metrics and task in LENGTH_NORMALIZED:
        return "acc_norm"
    return "acc" if "acc" in metrics else metrics[0]


def _chance(name: str, loaded: dict[str, Any], metric: str, samples: dict[str, list[Any]]) -> float | None:
    """Return the value of `metric` for guessing. A group's value is the mean that its score is."""
    group = loaded["groups"].get(name)
    if group is None:
        return _task_chance(loaded["tasks"][name], metric, samples[name])
    chances = {task: _task_chance(loaded["tasks"][task], metric, samples[task]) for task in loaded["tasks"]}
    by_size = any(each.metric == metric and each.weight_by_size for each in group.aggregate_metric_list)
    known = [(chance, len(samples[task]) if by_size else 1) for task, chance in chances.items() if chance is not None]
    if len(known) < len(chances):
        return None
    return sum(chance * weight for chance, weight in known) / sum(weight for _, weight in known)


def _task_chance(task: Any, metric: str, samples: list[dict[str, Any]]) -> float | None:
    """Return the mean over the documents of (right choices) / (choices).

    The result is 0 if every token must match, and None if guessing has no known value.
    """
    metric = metric.partition(",")[0]
    if callable(task.get_config("process_results")):
        return None  # the task has its own way of scoring
    if metric == "exact_match":
        return 0.0
    if metric not in CHOSEN or task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
        return None
    if task.OUTPUT_TYPE == "loglikelihood" and all(len(sample["arguments"]) == 1 for sample in samples):
        return 0.0
    shares = []
    for sample in samples:
        choices = len(sample["arguments"]) // (2 if "acc_mutual_info" in sample["metrics"] else 1)
        right = len(set(sample["target"])) if isinstance(sample["target"], list) else 1
        shares.append(right / choices)
    return sum(shares) / len(shares)


@contextlib.contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    """Put the model in evaluation mode inside the context, and restore its mode at the end."""
    if not isinstance(model, torch.nn.Module):
        yield
        return
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
