"""Checks before long work: that a model can do what the experiment asks of it, and that the last steps can run."""

from __future__ import annotations

from typing import Any

from distill import plugins
from distill.errors import UserError
from distill.evaluation.benchmarks import check_tasks
from distill.experiment.configuration import Experiment
from distill.experiment.training import check_training
from distill.models.contract import checked_head, not_finite, try_model
from distill.models.devices import check_number, pick_device
from distill.models.isolation import LENGTH, Rows, find_fault
from distill.training.loggers import check_loggers
from distill.training.user_callbacks import make_callbacks


def offered_options(experiment: Experiment, device: str, vocab_size: int, first_samples: Any = None) -> dict[str, Any]:
    """Return the arguments that a student's constructor gets if it names them and the user has not given them."""
    return {
        "vocab_size": vocab_size,
        "sequence_length": experiment.corpus.sequence_length,
        "teacher": experiment.teacher.model,
        # A teacher that the user gives among the options is another one, with a revision of its own.
        "teacher_revision": None if "teacher" in experiment.student.options else experiment.teacher.revision,
        "device": device,
        "first_samples": first_samples,
    }


def check_model(
    model: Any, name: str, vocab_size: int, pack: bool, *, length: int = LENGTH, trains: bool = False
) -> None:
    """Raise UserError if a model breaks the contract of body and head, on a few tokens, at most `length` a row.

    The head has too few rows, the code fails, outputs are not finite, or a position sees what it must not. Isolation
    cannot be measured on values that are not finite, so these are found first. `pack`: documents share rows. `trains`:
    it is a student before its training. The model is tried where its weights are: such a student is on the host.
    """
    device = checked_head(model, name, vocab_size).weight_VD.device
    length = min(length, LENGTH)
    rows = Rows.make(vocab_size, length, pack, device)
    logits_BLV = try_model(model, name, rows.ids_BL, rows.positions_BL, vocab_size, trains=trains)
    if not logits_BLV.isfinite().all():
        raise UserError(f"{name}: {not_finite(logits_BLV.dtype)}")
    if (fault := find_fault(model, vocab_size, device, pack=pack, length=length)) is not None:
        raise UserError(f"{name}: {fault.value}")


def check_length(limit: int | None, name: str, sequence_length: int) -> None:
    """Raise UserError if samples are longer than the `limit` tokens that a model says it can read."""
    if limit is not None and sequence_length > limit:
        raise UserError(f"corpus.sequence_length: {sequence_length} is beyond the {limit} tokens of {name}")


def check_last_steps(experiment: Experiment, device_type: str | None = None) -> None:
    """Check before the first step of a run the needs of the last ones, such as installed packages.

    `device_type`: kind of device that the student trains on elsewhere; default: this machine's, with its number of
    devices. Raises UserError for a logger or lm-eval that is not installed, for callbacks that cannot be made, for
    unknown benchmarks, for options that the student's class lacks or needs, and for settings of the training that
    exclude one another.
    """
    config = experiment.train
    check_loggers(config.loggers)
    make_callbacks(config.callbacks)
    if device_type is None:
        device_type = pick_device(config.accelerator).type
        check_number(config.devices, device_type, "train.devices")
    check_training(experiment, experiment.cache.scheme, experiment.cache.held_out_samples, device_type)
    offered = offered_options(experiment, device_type, 0)
    plugins.arguments(experiment.student.class_path, "student", experiment.student.options, offered)
    check_evaluation(experiment)


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
    if config.tasks:
        check_tasks(config.tasks, config.tasks_path)
