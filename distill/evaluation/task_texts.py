"""Texts of the documents of lm-eval's tasks, to look for them in a corpus."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from distill.evaluation.benchmarks import SEED
from distill.evaluation.task_files import demand_lm_eval, lm_eval_alone, load_task, task_error


def task_texts(name: str, tasks_path: str | None, limit: int | None) -> list[list[str]]:
    """Return the texts of each document that a task (or each task of a group) is measured on.

    These are all texts in the document, its prompt and its answer. `limit` takes the first documents of each task.
    Raises UserError as `run_tasks` does.
    """
    demand_lm_eval()
    with lm_eval_alone(SEED):
        tasks = load_task(name, tasks_path)["tasks"].values()
        try:
            return [
                list(dict.fromkeys(_texts_of(document, task)))
                for task in tasks
                for document in itertools.islice(task.eval_docs, limit)
            ]
        except Exception as error:  # a task is a program
            raise task_error(name, None, error) from error


def _texts_of(document: Any, task: Any) -> Iterator[str]:
    yield from _texts_in(document)
    yield from _texts_in(task.doc_to_text(document))
    yield from _texts_in(task.doc_to_target(document))


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts_in(inner)
