"""Whether a model can do what the experiment asks of it, before it is asked."""

from __future__ import annotations

from typing import Any

import torch

from distill.errors import UserError
from distill.evaluation.benchmarks import check_tasks
from distill.experiment.configuration import Experiment
from distill.experiment.training import check_training
from distill.models.devices import pick_device
from distill.models.isolation import isolates_documents
from distill.models.language_model import check_rows
from distill.training.loggers import check_installed

PROBE = 8
"""Tokens that a model is tried on."""


def check_model(model: Any, name: str, vocab_size: int, pack: bool) -> None:
    """Raises UserError when the head lacks tokens, outputs are not finite, or packed documents see one another.

    What is not finite is no measure of isolation, so it comes first. The model is tried where its weights are: a
    student that is yet to be trained is on the host.
    """
    check_vocabulary(model, name, vocab_size)
    device = model.head.weight_VD.device
    if (dtype := _not_finite(model, vocab_size, device)) is not None:
        raise UserError(
            f"{name}: its outputs are not finite: weights that are not, or sums too large for "
            f"{str(dtype).removeprefix('torch.')}; give other weights, or compute in a wider type"
        )
    if pack and not isolates_documents(model, vocab_size, device):
        raise UserError(
            f"{name}: packed documents see one another in this model (its state runs across position_ids that restart "
            "at 0): cache and train with --corpus.pack false"
        )


def check_vocabulary(model: Any, name: str, vocab_size: int) -> None:
    """Raise UserError when the head lacks tokens."""
    try:
        check_rows(model.head.weight_VD.shape[0], vocab_size)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


@torch.no_grad()
def _not_finite(model: Any, vocab_size: int, device: torch.device) -> torch.dtype | None:
    """The type of the logits of a few tokens when some of these are not finite; None when all are."""
    training = getattr(model, "training", False)
    if isinstance(model, torch.nn.Module):
        model.eval()
    try:
        positions_1L = torch.arange(PROBE, device=device)[None]
        logits_1LV = model.head.with_rows(vocab_size)(model.body(positions_1L * 7 % vocab_size, positions_1L))
    finally:
        if isinstance(model, torch.nn.Module):
            model.train(training)
    return None if logits_1LV.isfinite().all() else logits_1LV.dtype


def check_length(limit: int | None, name: str, sequence_length: int) -> None:
    """Raise UserError when samples are longer than the `limit` tokens that a model says it can read."""
    if limit is not None and sequence_length > limit:
        raise UserError(f"corpus.sequence_length: {sequence_length} is beyond the {limit} tokens of {name}")


def check_last_steps(experiment: Experiment) -> None:
    """What the last steps of a run need, before the first: nobody should hear after a night that a package is missing.

    Raises UserError for a logger or lm-eval that is not installed, for unknown benchmarks, and for what does not go
    together in the training.
    """
    config = experiment.train
    check_installed(config.loggers)
    check_training(
        experiment, experiment.cache.scheme, experiment.cache.held_out_samples, pick_device(config.accelerator).type
    )
    check_evaluation(experiment)


def check_evaluation(experiment: Experiment) -> None:
    """Raises UserError when lm-eval is not installed, does not know a task, or a batch size is none."""
    config = experiment.evaluate
    if config.cost and not (config.cost_batch_sizes and min(config.cost_batch_sizes) > 0):
        raise UserError(f"evaluate.cost_batch_sizes: {config.cost_batch_sizes}; give sizes from 1 up, or cost false")
    if config.tasks:
        check_tasks(config.tasks, config.tasks_path)
