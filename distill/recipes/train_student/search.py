"""The search for the student's sizes: candidates trained for a few steps each, the better half for twice as many.

Successive halving (Jamieson and Talwalkar 2016). Each candidate begins anew in every round and runs through the whole
schedule of the learning rate, because the order of students before it has fallen is not the order after.
"""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl

from distill.cache.reading.mixture import MixedReader
from distill.cache.reading.reader import CacheReader
from distill.errors import UserError
from distill.experiment import search
from distill.experiment.configuration import Experiment
from distill.experiment.folders import Folders
from distill.experiment.place import Place
from distill.experiment.roles import Role
from distill.experiment.search import Options, Record, Search
from distill.experiment.student import candidates, first_samples, make_student_to_train
from distill.experiment.training import make_data, make_module, teacher_head
from distill.forecast.sizes import Amount
from distill.forecast.steps import steps as steps_of
from distill.models.vocabulary import Vocabulary
from distill.system import interrupt
from distill.system.blame import blamed
from distill.system.memory import free_memory
from distill.system.progress import Progress, say
from distill.system.rank import is_first_process
from distill.system.units import three_or_four_digits
from distill.training.callbacks import ShowProgress
from distill.training.data import CacheDataModule
from distill.training.trainer import make_trainer


def found_sizes(
    experiment: Experiment, train: CacheReader | MixedReader, held_out: CacheReader, vocabulary: Vocabulary | None
) -> Experiment:
    """Return the experiment with a student of known sizes; search for them if it asks for that and nobody has.

    A candidate's measurement is written as soon as it is made, so that a killed search repeats one at most. Raises
    UserError if the cache holds no held-out samples to compare candidates on, or if another process should search.
    """
    wanted = search.asked(experiment)
    if wanted is None:
        return experiment
    found = search.with_found_sizes(experiment)
    if found is not experiment:
        return found
    if not len(held_out):
        raise UserError(
            "student.search: the cache holds no held-out samples to compare students on (cache.held_out_samples, "
            "corpus.held_out): make some, or give the sizes in student.options"
        )
    if not is_first_process():
        raise UserError(
            "student.search: run `train-student` with --train.devices 1 first, or give the sizes in student.options"
        )
    place, tokens = Place.of(experiment), train.manifest.vocab_size if vocabulary is None else len(vocabulary)
    record = _begun(experiment, wanted, place, tokens, train)
    folder = Folders.of(experiment).run
    total = steps_of(experiment, Amount(len(train), len(held_out), None))
    assert total is not None
    rounds = wanted.rounds(len(record.candidates), total)
    still = list(range(len(record.candidates)))
    for steps, keep in rounds:
        for number in still:
            one = record.candidates[number]
            if str(steps) not in one["kl"]:
                data = make_data(experiment, train, held_out, experiment.train.seed, vocabulary)
                one["parameters"], one["kl"][str(steps)] = _tried(experiment, one["options"], steps, data, place)
                record.write(folder)
                free_memory()
            say(f"search: {_text(one)} after {steps} steps: held-out KL {one['kl'][str(steps)]:.4f}")
        still = record.best(keep, steps)
    record.chosen = record.candidates[still[0]]["options"]
    record.write(folder)
    say(f"search: the best is {_text(record.candidates[still[0]])} (all of them: {folder / search.FILE})")
    return search.with_found_sizes(experiment)


def _begun(
    experiment: Experiment, wanted: Search, place: Place, tokens: int, train: CacheReader | MixedReader
) -> Record:
    """Return the search as far as it is done, or a new one."""
    asked = search.identity(experiment, train.manifest.fingerprints)
    record, file = search.read(experiment), Folders.of(experiment).run / search.FILE
    if record is None:
        found = candidates(experiment, place, wanted, tokens)
        return Record(asked, [{"options": options, "parameters": 0, "kl": {}} for options in found])
    if record.asked != asked:
        raise UserError(
            f"{file}: is of a search with other settings: choose another --run_dir, or remove it to search again"
        )
    return record


def _tried(
    experiment: Experiment, sizes: Options, steps: int, data: CacheDataModule, place: Place
) -> tuple[int, float]:
    """Train a candidate for so many steps; return its parameters and its held-out KL."""
    config = experiment.train
    own = search.sized(experiment, sizes)
    tokens = data.train.manifest.vocab_size if data.vocabulary is None else len(data.vocabulary)
    role = Role("candidate", experiment.loss.alpha, config.seed)
    student, _, _ = make_student_to_train(
        own, place, data.train.manifest.vocab_size, first_samples(data.train), data.vocabulary
    )
    module = make_module(own, place, role, student, tokens, teacher_head(data.train, data.vocabulary))
    measured = _MeasureAtEnd(data)
    progress = Progress("search", total=0, unit="steps")
    epochs = -(-steps // max(1, len(data.train) // data.step_samples))
    trainer = make_trainer(
        accelerator=config.accelerator,
        devices=1,
        num_nodes=1,
        strategy="auto",
        precision=config.precision,
        epochs=epochs,
        max_steps=steps,
        log_every_steps=steps + 1,
        loggers=[],
        callbacks=[ShowProgress(progress), measured],
    )
    with progress, interrupt.deferred(), blamed("student"):
        trainer.fit(module, datamodule=data)
    return sum(parameter.numel() for parameter in student.parameters()), measured.kl


class _MeasureAtEnd(pl.Callback):
    """A callback that measures the held-out KL after the last step; infinite if it is no number."""

    def __init__(self, data: CacheDataModule) -> None:
        self.data, self.kl = data, math.inf

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        interrupt.retake()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        interrupt.stop_if_asked()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        kl = pl_module.measure(self.data.val_dataloader()).get("held_out_kl", math.inf)
        self.kl = kl if math.isfinite(kl) else 1e9  # JSON knows no infinity


def _text(candidate: dict[str, Any]) -> str:
    """Return a candidate's sizes in words; its parameters are known once it was tried."""
    options = ", ".join(f"{name} {value}" for name, value in candidate["options"].items())
    size = f" ({three_or_four_digits(candidate['parameters'] / 1e6)} M)" if candidate["parameters"] else ""
    return options + size
