"""Whether a model can do what the experiment asks of it, before it is asked."""

from __future__ import annotations

from typing import Any

import torch

from distill.config import Experiment
from distill.errors import UserError
from distill.evaluation.benchmarks import check_tasks
from distill.models.isolation import isolates_documents
from distill.training.loggers import check_installed


def check_model(model: Any, name: str, vocab_size: int, device: torch.device, pack: bool) -> None:
    """Raises UserError when the head lacks tokens, or documents packed into one sample see one another."""
    rows = model.head.weight_VD.shape[0]
    if rows < vocab_size:
        raise UserError(f"{name}: its head has {rows} rows, the tokenizer {vocab_size} tokens: not the same vocabulary")
    if pack and not isolates_documents(model, vocab_size, device):
        raise UserError(
            f"{name}: packed documents see one another in this model (its state runs across position_ids that restart "
            "at 0): cache and train with --corpus.pack false"
        )


def check_length(model: Any, name: str, sequence_length: int) -> None:
    """Raises UserError when samples are longer than a Hugging Face model says it can read."""
    config = getattr(getattr(model, "model", None), "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and sequence_length > limit:
        raise UserError(f"{name}: it reads {limit} tokens, the cache has samples of {sequence_length} tokens")


def check_last_steps(experiment: Experiment) -> None:
    """What the last steps of a run need, before the first: nobody should hear after a night that a package is missing.

    Raises UserError for a logger or lm-eval that is not installed, and for unknown benchmarks.
    """
    check_installed(experiment.train.loggers)
    check_evaluation(experiment)


def check_evaluation(experiment: Experiment) -> None:
    """Raises UserError when lm-eval is not installed, does not know a task, or a batch size is none."""
    config = experiment.evaluate
    if config.cost and not (config.cost_batch_sizes and min(config.cost_batch_sizes) > 0):
        raise UserError(f"evaluate.cost_batch_sizes: {config.cost_batch_sizes}; give sizes from 1 up, or cost false")
    if config.tasks:
        check_tasks(config.tasks, config.tasks_path)
