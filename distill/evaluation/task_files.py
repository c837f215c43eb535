"""Tasks of lm-eval by name, from its own index or a folder of the user's, and lm-eval silenced and isolated."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.errors import UserError, first_line, nearest
from distill.system.quiet import quiet, quiet_datasets, quiet_transformers


def demand_lm_eval() -> None:
    """Raise UserError if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("benchmarks (evaluate.tasks) need lm-eval: pip install 'distill-small-card[eval]'")


def load_task(name: str, tasks_path: str | None) -> dict[str, Any]:
    """Return lm-eval's `{"tasks": …, "groups": …}` of one task or group, with its data."""
    manager = _manager_of(name, tasks_path)
    entry = manager.task_index.get(name)
    if entry is None:
        where = f" and {tasks_path} has none" if tasks_path else ""
        raise UserError(
            f"evaluate.tasks: lm-eval has no task '{name}'{where}{nearest(name, manager.all_tasks, most=3)}"
        )
    try:
        loaded = manager.load([name])
    except Exception as error:  # a task file is a program, so any error can come from it
        raise task_error(name, entry.yaml_path, error) from error
    group = loaded["groups"].get(name)
    if name not in loaded["tasks"] and (group is None or not group.has_aggregation):
        members = sorted(loaded["tasks"])
        shown = ", ".join(members[:8]) + (", …" if len(members) > 8 else "")
        raise UserError(
            f"evaluate.tasks: '{name}' is {len(members)} tasks without a score in common; name them: {shown}"
        )
    return loaded


def task_error(name: str, file: Path | None, error: Exception) -> UserError:
    """Return a UserError that says in one line what went wrong in a task."""
    said = first_line(error) or type(error).__name__
    if type(error).__module__.startswith(("httpx", "requests")) or isinstance(error, ConnectionError):
        return UserError(
            f"task '{name}': its data set is not on this machine, and the Hub cannot be reached ({said}): "
            "set evaluate.tasks_path to a folder of task files with local data, such as configs/tasks"
        )
    if isinstance(error, UserError | ImportError):
        return UserError(f"task '{name}': {said}")
    return UserError(f"task '{name}' ({file or 'lm-eval'}): {type(error).__name__}: {said}")


def _manager_of(name: str, tasks_path: str | None) -> Any:
    """Return lm-eval's index to look `name` up in. If two tasks have the name, the folder's is taken.

    lm-eval's own index takes ten seconds and more to read, and is not read if the folder has the task.
    """
    from lm_eval.tasks import TaskManager

    if tasks_path is None:
        return _own_manager()
    _check_folder(Path(tasks_path))
    local = TaskManager(include_path=tasks_path, include_defaults=False)
    entry = local.task_index.get(name)
    if entry is not None and entry.kind.name in ("TASK", "PY_TASK"):  # a group's members may be lm-eval's
        return local
    both = copy.copy(_own_manager())
    both._index = {**both.task_index, **local.task_index}
    both._all_tasks = sorted(both._index)
    return both


@functools.lru_cache(maxsize=1)
def _own_manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _check_folder(folder: Path) -> None:
    """Raise UserError if a task file cannot be read: lm-eval would pass over it and take its own task of the name."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not folder.is_dir():
        raise UserError(f"evaluate.tasks_path: {folder} is no folder")
    files: dict[str, Path] = {}
    for file in sorted(folder.rglob("*.yaml")):
        if not file.is_file():
            raise UserError(f"{file}: is no plain file: remove it")
        try:
            config = load_yaml(file, resolve_func=False)
        except Exception as error:  # yaml's errors, a missing `include`, a file that is a list
            raise UserError(f"{file}: no task file of lm-eval: {first_line(error)}") from error
        name = config.get("group", config.get("task"))
        if not isinstance(name, str):
            continue  # a fragment that other files include
        if name in files:
            raise UserError(f"{file}: task '{name}' is in {files[name]} already")
        files[name] = file
    if not files:
        raise UserError(f"evaluate.tasks_path: {folder} has no task files of lm-eval (*.yaml)")


@contextlib.contextmanager
def lm_eval_alone(seed: int) -> Iterator[None]:
    """Run lm-eval inside without its log lines, bars and prints, in this process alone, with its own random state."""
    import lm_eval.api.metrics as metrics
    import lm_eval.api.task as task
    import numpy

    kept = task.tqdm, metrics.bootstrap_stderr, random.getstate(), numpy.random.get_state()
    task.tqdm = lambda iterable, **_: iterable
    metrics.bootstrap_stderr = _bootstrap_stderr
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    try:
        with quiet(), quiet_datasets(), quiet_transformers():
            yield
    finally:
        task.tqdm, metrics.bootstrap_stderr = kept[:2]
        random.setstate(kept[2])
        numpy.random.set_state(kept[3])


def _bootstrap_stderr(statistic: Any, values: Any, iters: int) -> float:
    """Compute lm-eval's function of this name, without its bar, its print and its pool of processes."""
    from lm_eval.api import metrics

    chunk = min(1000, iters)
    resample = metrics._bootstrap_internal(statistic, chunk)
    return metrics.sample_stddev([value for seed in range(iters // chunk) for value in resample((seed, values))])
