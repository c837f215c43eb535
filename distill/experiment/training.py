"""The experiment's training: its roles, checks of its settings, and the LightningModule of a student."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from distill import plugins
from distill.cache.format.folder import Manifest
from distill.errors import UserError
from distill.experiment import settings
from distill.experiment.configuration import Experiment, StudentConfig
from distill.experiment.place import Place
from distill.losses.features import check_features
from distill.losses.objective import Mixture, check_divergence, make_divergence
from distill.models.language_model import Head
from distill.training.guards import NonFinite
from distill.training.module import DistillationModule
from distill.training.offload import check_offload, offload_activations
from distill.training.optimizers.adamw import check_optimizer, choose_rounding, make_optimizer
from distill.training.optimizers.rounding import Rounding
from distill.training.optimizers.schedule import Schedule
from distill.training.optimizers.step_in_backward import StepInBackward, check_step_in_backward
from distill.training.parallel import make_strategy


@dataclass(frozen=True)
class Role:
    """A model to train: the `student`, or the `control`, which learns from the text alone; each with its seed."""

    name: str
    """Name of its folder in the run: `student`, `control`, and with a further seed `seeds/1/student`."""
    alpha: float
    seed: int

    @property
    def monitor(self) -> str:
        """The value to minimise: a control's own loss, since it never sees the teacher, else the held-out KL."""
        return "held_out_loss" if self.alpha == 1 else "held_out_kl"

    def own(self, experiment: Experiment) -> Experiment:
        """Return the experiment with this role's seed."""
        return replace(experiment, train=replace(experiment.train, seed=self.seed))


def roles(experiment: Experiment) -> list[Role]:
    """Return all models that the experiment trains, in this order: its own seed first, then the further ones."""
    first = experiment.train.seed
    kinds = {"student": experiment.loss.alpha, **({"control": 1.0} if experiment.evaluate.control else {})}
    return [
        Role(kind if seed == first else f"seeds/{seed}/{kind}", alpha, seed)
        for seed in range(first, first + experiment.evaluate.seeds)
        for kind, alpha in kinds.items()
    ]


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
        micro_batch=train.batch_size,
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


def rounding_of(experiment: Experiment) -> Rounding:
    """Return the rounding of the experiment's training, never `auto`."""
    train = experiment.train
    return choose_rounding(train.rounding, train.optimizer, train.precision)


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
    )
    return StepInBackward(optimizer, module) if train.step_in_backward else optimizer


# Settings that may change when a training is resumed: they change its speed, its memory or its logs, not its result.
_MAY_CHANGE = {
    *("resume", "num_workers", "log_every_steps", "loggers", "callbacks"),
    *("max_time", "checkpoint_every_steps", "keep_checkpoints"),
    *("accelerator", "devices", "num_nodes", "strategy", "batch_size", "accumulate_grad_batches"),
    *("activation_checkpointing", "checkpoint_every_k", "offload_activations", "step_in_backward", "non_finite"),
}


def training_settings(experiment: Experiment, role: Role, cache: Manifest) -> dict[str, Any]:
    """Return the settings that a trained model depends on. Other settings make another model."""
    train = experiment.train
    return {
        **own_settings(experiment, role),
        settings.NOT_COMPARED: {"callbacks": train.callbacks},
        "samples_a_step": train.batch_size * train.accumulate_grad_batches * train.devices * train.num_nodes,
        "cache": {key: value for key, value in asdict(cache).items() if key not in ("made_with", "shard_samples")},
    }


def _described(student: StudentConfig) -> dict[str, Any]:
    """Return the student's settings, with the defaults of options that were not given.

    A class of the user's own has the hash of its code too.
    """
    name = student.class_path
    unsaid = {key: value for key, value in plugins.defaults(name, "student").items() if key not in student.options}
    source = None if plugins.is_built_in(name, "student") else plugins.source_of(name, "student")
    return {**asdict(student), "defaults": unsaid, "source": source}


def own_settings(experiment: Experiment, role: Role) -> dict[str, Any]:
    """Return those of the `training_settings` that the experiment alone tells, without the cache and the devices."""
    loss = asdict(experiment.loss)
    del loss["alpha"], loss["chunk_size"]
    train = {**asdict(experiment.train), "rounding": rounding_of(experiment)}
    return {
        "student": _described(experiment.student),
        "teacher": experiment.teacher.model,
        "alpha": role.alpha,
        "loss": loss,
        "train": {key: value for key, value in train.items() if key not in _MAY_CHANGE},
    }
