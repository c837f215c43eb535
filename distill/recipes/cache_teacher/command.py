"""`distill cache-teacher`: the teacher reads the corpus once and its answers go to disk."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import replace

from distill.cache.format.folder import Manifest, differences, read_journal, read_manifest
from distill.cache.format.part import Part
from distill.cache.making.writer import CacheWriter
from distill.cache.reading.reader import CacheReader
from distill.cache.reading.storage import is_url
from distill.cache.reading.verify import shards_of
from distill.errors import UserError
from distill.experiment.cache import as_packed, begun_in, check_cache_settings, open_cache, packing_of
from distill.experiment.configuration import Experiment
from distill.experiment.folders import Folders, make_run_folder
from distill.experiment.micro_batch import is_auto, with_recorded
from distill.experiment.place import Place
from distill.experiment.precision import with_types_of_machine
from distill.experiment.teacher import Teacher
from distill.forecast.machine.cards import this_machine
from distill.models import devices
from distill.recipes.cache_teacher.budget import check_budget_options
from distill.recipes.cache_teacher.telling import summarise
from distill.recipes.cache_teacher.work import Work, is_begun, is_finished, is_of_version_1, lacks_head
from distill.system import ledger
from distill.system.locks import sole_writer
from distill.system.progress import be_quiet, say
from distill.system.rank import is_first_process
from distill.system.units import parse_duration


def main(experiment: Experiment, following: tuple[str, ...] = ()) -> int:
    """Make the cache, or its missing shards; with `cache.devices` or `cache.num_nodes`, one of their processes.

    `following`: phases that run next, and that must fit too.
    """
    cache = experiment.cache
    limit = math.inf if cache.max_time is None else parse_duration(cache.max_time, "cache.max_time")
    deadline = time.monotonic() + limit
    check_budget_options(experiment)
    if cache.dir and is_url(cache.dir):
        return _accept_at_url(experiment, cache.dir)
    part = Part.parse(cache.part) if cache.part else None
    experiment = with_recorded(with_types_of_machine(experiment, "teacher.compute_dtype"))
    if is_auto(experiment, "cache.batch_size"):
        # Imported here, because it takes seconds that a finished cache does not need.
        from distill.forecast.preflight import with_micro_batch

        experiment = with_micro_batch(experiment, "cache.batch_size")
    folders = Folders.of(experiment)
    work = None
    if is_begun(experiment, folders):
        experiment = as_packed(experiment, begun_in(folders).packing)
    if is_begun(experiment, folders) and cache.devices * cache.num_nodes == 1:
        work = Work.of(experiment, folders, Teacher(experiment, Place.of(experiment)), part)
        if is_of_version_1(experiment, folders):
            work.describe()
            return _accept_version_1(folders, work.manifest)
        with sole_writer(folders.cache):
            if not work.missing() and not lacks_head(folders, work.manifest):
                work.describe()
                work.say_complete()
                return 0
    return _make(experiment, folders, part, deadline, following, work)


def _make(
    experiment: Experiment,
    folders: Folders,
    part: Part | None,
    deadline: float,
    following: tuple[str, ...],
    work: Work | None,
) -> int:
    """Make the cache, or its missing shards, as one of the job's processes. `work` is known for one that was begun."""
    from distill.cache.making.processes import make_trainer
    from distill.forecast.ahead import check_student_ahead, check_tokens_ahead
    from distill.forecast.preflight import Preflight
    from distill.recipes.cache_teacher.making import predict_missing

    cache, is_new = experiment.cache, not is_begun(experiment, folders)
    if is_first_process() and (following or is_new):
        _check_ahead(experiment, following)
    make_run_folder(folders)
    device_type = devices.pick_device(experiment.train.accelerator).type
    devices.check_number(cache.devices, device_type, "cache.devices")
    trainer = make_trainer(device_type, cache.devices, cache.num_nodes)
    if not trainer.is_global_zero:
        be_quiet()
    preflight = Preflight(experiment, "cache-teacher", following)
    if is_new:
        if is_first_process():
            card = this_machine("cuda" if preflight.device.type == "cuda" else "cpu")
            untried = check_student_ahead(experiment, card, with_weights=True)
            if untried is not None:
                say(untried)
        preflight.check()  # before a teacher of many gigabytes is fetched
    if work is None:
        teacher = Teacher(experiment, replace(Place.of(experiment), device=trainer.strategy.root_device))
        work = Work.of(experiment, folders, teacher, part)
        if is_new and is_first_process():
            check_tokens_ahead(experiment, teacher.tokenizer)  # which may have come from the hub just now
    work.describe()
    if is_of_version_1(experiment, folders):
        return _accept_version_1(folders, work.manifest)
    # The process of rank 0 holds the folder for all of them, and opens it before they do.
    with sole_writer(folders.cache) if trainer.is_global_zero else contextlib.nullcontext():
        if trainer.is_global_zero:
            missing = work.missing()
            if not missing and not lacks_head(folders, work.manifest):
                work.say_complete()
                return 0
            if len(missing) < len(work.shards):
                say(f"cache: {len(work.shards) - len(missing)} of {len(work.shards)} shards are there; continuing")
        elif is_finished(folders, work.manifest, work.shards):
            return 0
        with preflight, ledger.phase(folders.run, "cache-teacher"):
            predict_missing(work, trainer, deadline)
    summarise(folders, part)
    return 0


def _check_ahead(experiment: Experiment, following: tuple[str, ...]) -> None:
    """Raise UserError for all that training and evaluation would refuse on settings alone, after the teacher's hours.

    A student that does not train here may train on a device that this machine lacks.
    """
    from distill.experiment.last_steps import check_held_out, check_last_steps

    if "evaluate" in following:
        check_held_out(experiment)
    elif not experiment.corpus.held_out:
        say("corpus.held_out is 0: `distill evaluate` will have no text to measure students of this cache on")
    here = devices.pick_device(experiment.train.accelerator).type
    elsewhere = "cuda" if experiment.train.accelerator == "auto" else here
    check_last_steps(experiment, None if "train-student" in following else elsewhere)


def _accept_at_url(experiment: Experiment, url: str) -> int:
    """Accept a finished cache at a URL. Raises UserError for any other: a cache is made in a folder."""
    made_here = "a cache is made in a local folder, and `distill push CACHE --to URL` brings it there"
    try:
        reader = CacheReader(open_cache(experiment), "train")
    except UserError as error:
        raise UserError(f"cache.dir: {error}: {made_here}") from None
    check_cache_settings(as_packed(experiment, packing_of(reader.manifest)), reader.manifest, url)
    say(f"cache: {url} is complete, {len(reader):,} training samples; it is read from there")
    return 0


def _accept_version_1(folders: Folders, manifest: Manifest) -> int:
    """Say that a finished cache of an earlier release is complete. Raises UserError for any other: it is only read."""
    found = read_manifest(folders.cache)
    shards = shards_of(folders.cache, found)
    if differences(manifest, found) or any(shard not in read_journal(folders.cache, found) for shard in shards):
        CacheWriter(folders.cache, manifest)  # which says what is the matter
    say(f"cache: {folders.cache} is complete ({len(shards)} shards, format version {found.version}); nothing to do")
    return 0
