"""The experiment's training: checks of its settings, and the LightningModule of a student."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from distill.cache.reading.mixture import MixedReader
from distill.cache.reading.reader import CacheReader
from distill.errors import UserError
from distill.experiment.configuration import Experiment
from distill.experiment.place import Place
from distill.experiment.roles import Role, rounding_of
from distill.losses.features import check_features
from distill.losses.objective import Mixture, check_divergence, make_divergence
from distill.models.language_model import Head
from distill.models.vocabulary import Vocabulary, trim_head
from distill.training.data import CacheDataModule
from distill.training.guards import NonFinite
from distill.training.module import DistillationModule
from distill.training.offload import check_offload, offload_activations
from distill.training.optimizers.adamw import check_optimizer, make_optimizer
from distill.training.optimizers.schedule import Schedule
from distill.training.optimizers.step_in_backward import StepInBackward, check_step_in_backward
from distill.training.parallel import make_strategy


def check_training(experiment: Experiment, scheme: str, held_out: int, device: str) -> None:
    """Raise UserError for settings that exclude one another, a `device` (its type), or a cache of `scheme`."""
    loss, train = experiment.loss, experiment.train
    if train.precision == "16-mixed" and device != "cuda":
        raise UserError("train.precision: 16-mixed needs a CUDA device; use bf16-mixed or 32-true here")
    if train.num_nodes > 1 and experiment.evaluate.control:
        raise UserError(
            "train.num_nodes: several machines train one model a command: give --evaluate.control false, and train the "
            "control as a student of its own (--loss.alpha 1 with another --run_dir)"
        )
    make_strategy(train.strategy, train.devices * train.num_nodes)
    make_divergence(loss.divergence, beta=loss.beta, skew=loss.skew)
    check_divergence(loss.divergence, scheme)
    check_features(loss.feature_weight, scheme)
    if train.early_stopping is not None and not held_out:
        raise UserError("train.early_stopping: the cache holds no held-out samples to watch (cache.held_out_samples)")
    if train.texts_every_steps is not None and not (held_out and experiment.evaluate.texts):
        lacking = "cache.held_out_samples" if not held_out else "evaluate.texts"
        raise UserError(f"train.texts_every_steps: {lacking} is 0, so there are no prompts to write on from: give some")
    check_optimizer(
        train.optimizer,
        rounding=rounding_of(experiment),
        precision=train.precision,
        device_type=device,
        strategy=train.strategy,
    )
    if train.offload_activations:
        check_offload(device)
    if train.step_in_backward:
        check_step_in_backward(
            accumulate_grad_batches=train.accumulate_grad_batches,
            gradient_clip=train.gradient_clip,
            devices=train.devices,
            num_nodes=train.num_nodes,
            strategy=train.strategy,
            precision=train.precision,
            non_finite=train.non_finite,
        )


def make_module(
    experiment: Experiment,
    place: Place,
    role: Role,
    student: Any,
    vocab_size: int,
    teacher_head: Head | None = None,
) -> DistillationModule:
    """Make the LightningModule that trains a student. `teacher_head` is that of a cache of hidden states."""
    train, loss = experiment.train, experiment.loss
    divergence = make_divergence(loss.divergence, beta=loss.beta, skew=loss.skew)
    return DistillationModule(
        student,
        vocab_size=vocab_size,
        objective=Mixture(role.alpha, experiment.cache.temperature, divergence),
        chunk_size=loss.chunk_size,
        micro_batch=train.micro_batch,
        make_optimizer=partial(_optimizer, experiment, place.device_type),
        make_schedule=lambda total: Schedule(
            train.schedule, total, train.warmup_fraction, train.decay_fraction, train.final_learning_rate
        ),
        gradient_clip=train.gradient_clip,
        non_finite=NonFinite(train.non_finite),
        seed=train.seed,
        teacher_head=teacher_head,
        schedule_teacher=loss.alpha_schedule == "with_learning_rate",
        feature=loss.feature,
        feature_weight=0.0 if role.alpha == 1 else loss.feature_weight,
        **({"saved_activations": offload_activations} if train.offload_activations else {}),
    )


def make_data(
    experiment: Experiment,
    train: CacheReader | MixedReader,
    held_out: CacheReader,
    seed: int,
    vocabulary: Vocabulary | None = None,
) -> CacheDataModule:
    """Make the batches of a training, in the order of its `seed`."""
    config = experiment.train
    return CacheDataModule(
        train,
        held_out if len(held_out) else None,
        step_samples=config.samples_of_step,
        batch_size=config.micro_batch,
        seed=seed,
        num_workers=config.num_workers,
        vocabulary=vocabulary,
    )


def teacher_head(train: CacheReader | MixedReader, vocabulary: Vocabulary | None) -> Head | None:
    """Return the teacher's head from a cache of hidden states, in the student's vocabulary; None for other caches."""
    head = train.teacher_head
    return head if vocabulary is None or head is None else trim_head(head, vocabulary)


def _optimizer(experiment: Experiment, device_type: str, module: torch.nn.Module) -> torch.optim.Optimizer:
    train = experiment.train
    optimizer = make_optimizer(
        module,
        name=train.optimizer,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        betas=(train.beta1, train.beta2),
        rounding=train.rounding,
        device_type=device_type,
        is_scaled=train.precision == "16-mixed",
    )
    return StepInBackward(optimizer, module) if train.step_in_backward else optimizer
