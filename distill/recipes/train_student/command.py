"""`distill train-student`: the student learns from the cache; a control, from the text alone."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby
from typing import Any

from distill.cache.format.tokenizer_files import checked_tokenizer
from distill.cache.reading.mixture import MixedReader
from distill.cache.reading.reader import CacheReader
from distill.cache.reading.storage import Storage
from distill.errors import UserError
from distill.experiment import settings
from distill.experiment.cache import as_packed, check_cache_settings, open_training, packing_of
from distill.experiment.configuration import Experiment
from distill.experiment.folders import Folders, make_run_folder
from distill.experiment.micro_batch import is_auto, with_recorded
from distill.experiment.place import Place
from distill.experiment.precision import with_types_of_machine
from distill.experiment.roles import Role, roles, training_settings
from distill.experiment.search import with_found_sizes
from distill.experiment.student import check_tokens
from distill.models.devices import check_number, pick_device
from distill.models.tokenizers import load_folder_tokenizer
from distill.system.files import sole_writer
from distill.system.progress import be_quiet, say
from distill.system.rank import is_first_process
from distill.system.staging import recover
from distill.system.units import parse_duration


def main(experiment: Experiment, following: tuple[str, ...] = ()) -> int:
    """Train the student and, if asked for, the control. `following` are phases that run next and must fit too."""
    if not is_first_process():
        be_quiet()
    experiment = with_found_sizes(with_types_of_machine(experiment, "train.precision"))
    config = experiment.train
    deadline = None if config.max_time is None else time.monotonic() + parse_duration(config.max_time, "train.max_time")
    folders = Folders.of(experiment)
    if experiment.rounds.count and config.begin_from is None:
        raise UserError("rounds: `distill run` makes them; to train on the corpus alone, give --rounds.count 0")
    make_run_folder(folders)
    for is_control, members in groupby(roles(experiment), key=lambda role: role.is_control):
        # A control never sees rounds, so it may learn from another cache.
        caches = {} if is_control and experiment.rounds.count else config.caches
        own = replace(experiment, train=replace(config, caches=caches))
        train, held_out = open_training(own)
        # The first cache is that of the experiment, or of its corpus, also where only its held-out samples are read.
        storage = held_out.storage
        own = as_packed(own, packing_of(held_out.manifest))
        check_cache_settings(own, held_out.manifest, storage.name)
        pending = [role for role in members if not is_done(role, own, folders, train)]
        if pending:
            _train(own, folders, storage, train, held_out, pending, deadline, following)
    return 0


def is_done(role: Role, experiment: Experiment, folders: Folders, train: CacheReader | MixedReader) -> bool:
    """Tell whether a model is finished. Raises UserError if the folder holds another one."""
    folder = folders.model(role.name)
    recover(folder)
    if not folder.exists():
        return False
    if not (folder / settings.FILE).exists():
        raise UserError(f"{folder}: not a {role.name} that was finished here: choose another --run_dir, or remove it")
    different = settings.differences(folder, training_settings(role.own(experiment), role, train))
    if different:
        raise UserError(
            f"{folder} was trained with other settings ({'; '.join(different)}): "
            f"choose another --run_dir, or remove {folder} and {folders.checkpoints(role.name)}"
        )
    say(f"{role.name}: {folder} is trained; nothing to do")
    return True


def _train(
    experiment: Experiment,
    folders: Folders,
    storage: Storage,
    train: CacheReader | MixedReader,
    held_out: CacheReader,
    pending: list[Role],
    deadline: float | None,
    following: Any,
) -> None:
    # Imported here, because these take seconds that a finished training does not need.
    from distill.experiment.training import check_training
    from distill.forecast.preflight import Preflight, with_micro_batch
    from distill.recipes.train_student.fit import Training, kept_vocabulary
    from distill.recipes.train_student.search import found_sizes
    from distill.training.loggers import check_installed
    from distill.training.user_callbacks import check_callbacks

    check_installed(experiment.train.loggers)
    check_callbacks(experiment.train.callbacks)
    device_type = pick_device(experiment.train.accelerator).type
    check_number(experiment.train.devices, device_type, "train.devices")
    check_training(experiment, train.manifest.scheme, len(held_out), device_type)
    check_tokens(experiment, Place.of(experiment), load_folder_tokenizer(checked_tokenizer(storage.folder)))
    experiment = with_recorded(experiment)
    if is_auto(experiment, "train.batch_size"):
        experiment = with_micro_batch(experiment, "train.batch_size")
    with Preflight(experiment, "train-student", following):
        vocabulary = kept_vocabulary(experiment, storage, train, held_out)
        experiment = found_sizes(experiment, train, held_out, vocabulary)
        for role in pending:
            training = Training(role.own(experiment), folders, train, role)
            with sole_writer(training.checkpoints) if is_first_process() else nullcontext():
                training.fit(held_out, vocabulary, deadline)
