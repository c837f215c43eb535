"""Checks before long work that its last steps can run: installed packages, callbacks, benchmarks, settings."""

from __future__ import annotations

from typing import Any

from distill import plugins
from distill.corpus.own_reader import load_reader
from distill.errors import UserError
from distill.evaluation import benchmarks
from distill.experiment.checks import offered_options
from distill.experiment.configuration import Experiment
from distill.experiment.search import asked
from distill.experiment.training import check_training
from distill.models.devices import check_number, pick_device
from distill.training.loggers import check_loggers
from distill.training.user_callbacks import make_callbacks


def check_last_steps(experiment: Experiment, device_type: str | None = None) -> None:
    """Check before the first step of a run the needs of the last ones, such as installed packages.

    `device_type`: kind of device that the student trains on elsewhere; default: this machine's, with its number of
    devices. Raises UserError for a reader that is not there, for a logger or lm-eval that is not installed, for
    callbacks that cannot be made, for unknown benchmarks, for options that the student's class lacks or needs, and for
    settings of the training that exclude one another.
    """
    config = experiment.train
    for source in experiment.corpus.all_sources:
        load_reader(source.reader)
    check_loggers(config.loggers)
    make_callbacks(config.callbacks)
    if device_type is None:
        device_type = pick_device(config.accelerator).type
        check_number(config.devices, device_type, "train.devices")
    check_training(experiment, experiment.cache.scheme, experiment.cache.held_out_samples, device_type)
    offered = offered_options(experiment, device_type, 0)
    check_search(experiment)
    plugins.arguments(experiment.student.class_path, "student", experiment.student.options, offered)
    check_evaluation(experiment)


def check_search(experiment: Experiment) -> None:
    """Raise UserError for a search that is asked for wrongly, or without held-out samples to compare students on."""
    if asked(experiment) is not None and not (experiment.cache.held_out_samples and experiment.corpus.held_out):
        raise UserError(
            "student.search: students are compared on held-out samples: give corpus.held_out and "
            "cache.held_out_samples, or the sizes in student.options"
        )


def check_held_out(experiment: Experiment) -> None:
    """Raise UserError if an evaluation has no text that was not trained on."""
    if not experiment.corpus.held_out:
        raise UserError(
            "corpus.held_out: 0 leaves nothing to evaluate on: give a share such as 0.05, or run cache-teacher and "
            "train-student alone"
        )


def check_evaluation(experiment: Experiment) -> None:
    """Raise UserError if lm-eval is not installed, does not know a task, or a batch size is below 1."""
    config = experiment.evaluate
    if config.cost and not config.cost_batch_sizes:
        raise UserError("evaluate.cost_batch_sizes: give at least one size, or --evaluate.cost false")
    if config.metric is not None:
        plugins.load(config.metric, "metric")
        if not config.own_texts:
            raise UserError("evaluate.metric: measures answers, and none are written: give --evaluate.own_texts 100")
    if config.tasks:
        benchmarks.check_tasks(config.tasks, config.tasks_path)


def check_tokenizer(experiment: Experiment, tokenizer: Any) -> None:
    """Raise UserError for a teacher's tokenizer that the benchmarks, if there are any, cannot begin a text with."""
    if experiment.evaluate.tasks:
        benchmarks.check_tokenizer(tokenizer)
