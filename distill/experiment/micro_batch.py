"""The micro-batches behind `auto`: their possible sizes, and the ones that a run's first starts recorded.

The record of the teacher's is its cache, that of the student's the settings of its training. Later starts take it, on
another machine too, so that a resumed phase goes on in the batches that it began with.
`distill.forecast.micro_batch` chooses where there is no record.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from distill.cache.format import in_flight
from distill.cache.format.folder import MANIFEST, SHARDS, Manifest, read_journal, read_manifest
from distill.cache.format.leftovers import is_unused
from distill.experiment import search
from distill.experiment.configuration import Experiment
from distill.experiment.folders import Folders
from distill.experiment.precision import trainings
from distill.experiment.settings import NOT_COMPARED
from distill.system.rank import is_first_process

Key = Literal["cache.batch_size", "train.batch_size"]
RECORD = "batch_size"
"""Name of the record in a manifest's `made_with`, and among a training's settings."""
MOST = 2**16
PROCESSOR_TOKENS = 2048
"""Tokens of a micro-batch up to which `auto` goes on a processor, where more of them cost memory and save little: with
micro-batches of 512, 1,024 and 2,048 tokens a sample of 256 takes 0.97, 0.97 and 0.95 to 1.00 of its time
alone (`tests/benchmarks/micro_batches.py`, two turns)."""


def is_auto(experiment: Experiment, key: Key) -> bool:
    """Tell whether a micro-batch is still to be chosen."""
    return (experiment.cache if key == "cache.batch_size" else experiment.train).batch_size == "auto"


def sizes(experiment: Experiment, key: Key, is_cuda: bool) -> list[int]:
    """Return the sizes that `auto` may take, rising: no batch straddles shards, and a step is divided evenly.

    An update inside the backward pass allows no second pass, so that a step is one.
    """
    if key == "cache.batch_size":
        most = experiment.cache.shard_samples
        found = [*(size for size in (2**power for power in range(17)) if size < most), min(most, MOST)]
    else:
        step, is_one = experiment.train.samples_of_step, experiment.train.step_in_backward
        found = [step] if is_one else [size for size in range(1, step + 1) if step % size == 0]
    enough = MOST if is_cuda else max(1, PROCESSOR_TOKENS // experiment.corpus.sequence_length)
    return [size for size in found if size <= enough] or found[:1]


def with_size(experiment: Experiment, key: Key, size: int) -> Experiment:
    """Return the experiment with a number in place of `auto`. The samples of an optimiser step stay the same."""
    if key == "cache.batch_size":
        return replace(experiment, cache=replace(experiment.cache, batch_size=size))
    passes = -(-experiment.train.samples_of_step // size)
    train = replace(experiment.train, batch_size=size, accumulate_grad_batches=passes, step_samples=None)
    return replace(experiment, train=train)


def with_recorded(experiment: Experiment) -> Experiment:
    """Return the experiment with the recorded micro-batches in place of `auto`, as far as there are any."""
    if is_auto(experiment, "cache.batch_size") and (size := _of_cache(experiment)) is not None:
        experiment = with_size(experiment, "cache.batch_size", size)
    if is_auto(experiment, "train.batch_size") and (size := _of_training(experiment)) is not None:
        experiment = with_size(experiment, "train.batch_size", size)
    return experiment


def _of_cache(experiment: Experiment) -> int | None:
    """Return the smallest size of a batch in the run's cache, to which memory may have brought it, or None."""
    folder = Folders.of(experiment).cache
    # The first of several processes has begun the cache that the others find.
    counts = not is_first_process() or not (experiment.cache.overwrite or is_unused(folder))
    if not counts or not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder)
    said = manifest.made_with.get(RECORD, "")
    begun_with = int(said) if said.isascii() and said.isdecimal() and len(said) < 6 else None
    return min(filter(None, _used(folder, manifest)), default=begun_with if _is_size(begun_with) else None)


def _used(folder: Path, manifest: Manifest) -> Iterator[int]:
    """Yield the sizes of finished shards, and of shards in flight; 0 where they do not tell."""
    yield from (entry.batch_size for entry in read_journal(folder, manifest).values())
    for path in (folder / SHARDS).glob(f"*{in_flight.SUFFIX}"):
        shard = manifest.shard_of_file(f"{SHARDS}/{path.stem}.safetensors")
        if shard is not None:
            yield in_flight.read(folder, manifest, shard).batch_size


def _of_training(experiment: Experiment) -> int | None:
    """Return the size in the run's trainings, or in its search for sizes before them, if it divides a step, or None."""
    step = experiment.train.samples_of_step
    known: list[Any] = [found.get(NOT_COMPARED, {}).get(RECORD) for found in trainings(experiment)]
    if not known and search.asked(experiment) is not None and (record := search.read(experiment)) is not None:
        known = [record.asked.get("train", {}).get(RECORD)]
    return next((size for size in known if _is_size(size) and step % size == 0), None)


def _is_size(size: Any) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= MOST
