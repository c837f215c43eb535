"""The types that an experiment computes in: the choice behind `auto`, which the first start makes and records.

The record of a teacher's type is its cache's manifest, that of a training its settings. Later starts take the recorded
type, on another machine too: a cache or a training of two types would be none that anybody asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

from distill.cache.format.folder import MANIFEST, read_manifest
from distill.cache.format.leftovers import is_unused
from distill.errors import UserError
from distill.experiment import settings
from distill.experiment.configuration import Experiment
from distill.experiment.folders import Folders
from distill.experiment.roles import roles
from distill.models import devices
from distill.system.progress import say
from distill.system.rank import is_first_process

PRECISIONS = {"bfloat16": "bf16-mixed", "float16": "16-mixed", "float32": "32-true"}
"""Lightning's precision of a training that computes in a type. Its weights stay float32."""

Key = Literal["teacher.compute_dtype", "train.precision"]


def has_auto(experiment: Experiment) -> bool:
    """Tell whether a type is still to be chosen."""
    return "auto" in (experiment.teacher.compute_dtype, experiment.train.precision)


def with_types(experiment: Experiment, dtype: Callable[[], str], precision: Callable[[], str]) -> Experiment:
    """Return the experiment with types in place of `auto`."""
    teacher, train = experiment.teacher, experiment.train
    if teacher.compute_dtype == "auto":
        teacher = replace(teacher, compute_dtype=dtype())  # type: ignore[arg-type]
    if train.precision == "auto":
        train = replace(train, precision=precision())  # type: ignore[arg-type]
    return replace(experiment, teacher=teacher, train=train)


def with_types_of_card(experiment: Experiment, is_cuda: bool, has_bf16: bool) -> Experiment:
    """Return the experiment with the types that `auto` stands for on a card that may be elsewhere."""
    dtype = devices.dtype_of_card(is_cuda, has_bf16)
    return with_types(experiment, lambda: dtype, lambda: PRECISIONS[dtype])


def with_types_of_machine(experiment: Experiment, phase: Key | None = None) -> Experiment:
    """Return the experiment with the types that `auto` stands for in its run: those recorded, else this machine's.

    `phase`: the key that the caller is about to record. Its choice is said. Raises UserError where several machines
    make one result together, each of which would choose by itself.
    """
    if not has_auto(experiment):
        return experiment

    def best() -> str:
        return devices.compute_dtype("auto", devices.pick_device(experiment.train.accelerator))

    def dtype() -> str:
        return _recorded_dtype(experiment) or _chosen(experiment, "teacher.compute_dtype", best(), phase)

    def precision() -> str:
        return _recorded_precision(experiment) or _chosen(experiment, "train.precision", PRECISIONS[best()], phase)

    return with_types(experiment, dtype, precision)


def _chosen(experiment: Experiment, key: Key, value: str, phase: Key | None) -> str:
    if key != phase:
        return value
    cache, train = experiment.cache, experiment.train
    shared = {
        "teacher.compute_dtype": "cache.part" if cache.part else "cache.num_nodes" if cache.num_nodes > 1 else None,
        "train.precision": "train.num_nodes" if train.num_nodes > 1 else None,
    }[key]
    if shared is not None:
        raise UserError(
            f"{key}: auto and {shared}: each machine would choose by itself, and they must agree: give all of them "
            f"one value; this machine would take --{key} {value}"
        )
    say(f"{key}: auto takes {value}{_reason(experiment)}")
    return value


def _reason(experiment: Experiment) -> str:
    device = devices.pick_device(experiment.train.accelerator)
    if device.type != "cpu":
        return ""
    return f" (this processor multiplies in bfloat16 at {devices.bfloat16_speed():.1f} × float32's speed)"


def _recorded_dtype(experiment: Experiment) -> str | None:
    """Return the type of the teacher whose answers the run has, or None."""
    folder = Folders.of(experiment).cache
    # The first of several processes has begun the cache that the others find.
    counts = not is_first_process() or not (experiment.cache.overwrite or is_unused(folder))
    if counts and (folder / MANIFEST).is_file():
        return _dtype_of(read_manifest(folder).fingerprints)
    return next((_dtype_of(found["cache"]["fingerprints"]) for found in trainings(experiment)), None)


def _dtype_of(fingerprints: dict[str, str]) -> str | None:
    """Return the type in `nf4, bfloat16`."""
    dtype = fingerprints.get("quantization", "").rpartition(", ")[2]
    return dtype if dtype in devices.DTYPES else None


def _recorded_precision(experiment: Experiment) -> str | None:
    """Return the precision of the run's trainings, finished or begun, or None."""
    return next((found["train"]["precision"] for found in trainings(experiment)), None)


def trainings(experiment: Experiment) -> Iterator[dict[str, Any]]:
    """Yield the settings of the run's trainings. A damaged file is the business of those that need it."""
    folders, before = Folders.of(experiment), experiment.train.begin_from
    begun = [] if before is None else [Folders.of_training(before).model("student")]
    for role in roles(experiment):
        for folder in (folders.model(role.name), folders.checkpoints(role.name), *begun):
            try:
                found = settings.read(folder)
                precision, fingerprints = found["train"]["precision"], found["cache"]["fingerprints"]
            except (UserError, KeyError, TypeError):
                continue
            if isinstance(precision, str) and isinstance(fingerprints, dict):
                yield found
