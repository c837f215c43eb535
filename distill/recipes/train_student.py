"""`distill train-student`: the student learns from the cache; a control, from the text alone."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from transformers import AutoTokenizer

from distill import interrupt
from distill.cache.format import Manifest
from distill.cache.head import load_head
from distill.cache.reader import CacheReader
from distill.cache.tokenizer_files import checked_tokenizer
from distill.config import Experiment, TrainConfig
from distill.errors import UserError
from distill.losses.divergences import Mixture
from distill.models import devices
from distill.models.saving import save_language_model
from distill.progress import Progress, say
from distill.training.activation_checkpointing import checkpoint_blocks
from distill.training.callbacks import ShowProgress, StopWhenAsked
from distill.training.data import CacheDataModule
from distill.training.module import DistillationModule
from distill.training.optimizer import Schedule
from distill.workspace import (
    Folders,
    build_student,
    check_cache_settings,
    check_length,
    check_model,
    make_run_folder,
    open_cache,
    write_json,
)

_SETTINGS = "settings.json"


def main(experiment: Experiment) -> int:
    """Train the student and, if asked for, the control."""
    folders = Folders.of(experiment)
    make_run_folder(folders)
    _check_precision(experiment)
    storage = open_cache(experiment)
    train = CacheReader(storage, "train")
    check_cache_settings(experiment, train.manifest, storage.name)
    held_out = CacheReader(storage, "held_out")
    data = CacheDataModule(
        train,
        held_out if len(held_out) else None,
        experiment.train.batch_size,
        experiment.train.seed,
        experiment.train.num_workers,
    )
    roles = {"student": experiment.loss.alpha}
    if experiment.evaluate.control:
        roles["control"] = 1.0
    for role, alpha in roles.items():
        _train(experiment, folders, data, role, alpha)
    return 0


def _check_precision(experiment: Experiment) -> None:
    device = devices.pick_device(experiment.train.accelerator)
    if experiment.train.precision == "16-mixed" and device.type != "cuda":
        raise UserError("train.precision: 16-mixed needs a CUDA device; use bf16-mixed or 32-true here")


def _train(experiment: Experiment, folders: Folders, data: CacheDataModule, role: str, alpha: float) -> None:
    manifest = data.train.manifest
    settings = _settings(experiment, alpha, manifest)
    if _is_done(folders, role, settings):
        say(f"{role}: {folders.model(role)} is trained; nothing to do")
        return
    resume_from = _checkpoint_to_resume(folders, role, settings, experiment.train.resume)
    student, options = build_student(experiment, manifest.vocab_size)
    device = devices.pick_device(experiment.train.accelerator)
    name = f"student {experiment.student.class_path}"
    check_length(student, name, manifest.sequence_length)
    check_model(student, name, manifest.vocab_size, device, manifest.pack)
    parameters = sum(parameter.numel() for parameter in student.parameters())
    say(f"{role}: {experiment.student.class_path}, {parameters / 1e6:,.1f} M parameters, alpha {alpha:g}")
    if experiment.train.activation_checkpointing:
        say(f"{role}: activation checkpointing of {_checkpoint(student, name)} blocks")
    write_json(_made(folders.checkpoints(role)) / _SETTINGS, settings)
    started = time.monotonic()
    _fit(experiment, folders, data, student, role, alpha, resume_from)
    tokenizer = AutoTokenizer.from_pretrained(checked_tokenizer(data.train.storage.folder))
    saved = save_language_model(student, folders.model(role), experiment.student.class_path, options, tokenizer)
    # Written last: the model counts as done only with it.
    write_json(saved / _SETTINGS, settings)
    say(f"{role}: {saved} after {time.monotonic() - started:,.0f} s")


def _fit(
    experiment: Experiment,
    folders: Folders,
    data: CacheDataModule,
    student: Any,
    role: str,
    alpha: float,
    resume_from: Path | None,
) -> None:
    config = experiment.train
    schedule = partial(
        Schedule,
        config.schedule,
        warmup_fraction=config.warmup_fraction,
        decay_fraction=config.decay_fraction,
        final=config.final_learning_rate,
    )
    module = DistillationModule(
        student,
        vocab_size=data.train.manifest.vocab_size,
        divergence=Mixture(alpha, data.train.manifest.temperature),
        teacher_head=load_head(data.train.storage.folder) if data.train.manifest.scheme == "hidden" else None,
        chunk_size=experiment.loss.chunk_size,
        nominal_positions=config.batch_size * data.train.manifest.sequence_length,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(config.beta1, config.beta2),
        make_schedule=lambda total: schedule(total=total),
    )
    checkpoints = folders.checkpoints(role)
    # Lightning's bf16-true would cast the batch too, the targets' weights among it, and make bfloat16 the default type
    # inside a step, in which the positions of a step cannot be counted. Weights in bfloat16 are all that is wanted.
    precision = config.precision
    if precision == "bf16-true":
        precision = "32-true"
        student.to(torch.bfloat16)
    progress = Progress(f"train {role}", total=0, unit="steps")
    trainer = pl.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        precision=precision,
        max_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        accumulate_grad_batches=config.accumulate_grad_batches,
        gradient_clip_val=config.gradient_clip or None,
        val_check_interval=_validate_every_batches(config, len(data.train)),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=config.log_every_steps,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=_loggers(_made(folders.logs(role))),
        callbacks=[
            *_keep_checkpoints(checkpoints, data),
            ShowProgress(progress),
            StopWhenAsked(checkpoints / "last.ckpt"),
        ],
    )
    with progress, interrupt.deferred():
        trainer.fit(module, datamodule=data, ckpt_path=resume_from, weights_only=True)
    trainer.save_checkpoint(checkpoints / "last.ckpt", weights_only=False)


def _keep_checkpoints(folder: Path, data: CacheDataModule) -> list[ModelCheckpoint]:
    """The best by held-out loss and the last, each written when the held-out loss was measured."""
    last = ModelCheckpoint(folder, filename="last", enable_version_counter=False, save_top_k=1, monitor=None)
    if data.held_out is None:
        return [last]
    return [last, ModelCheckpoint(folder, filename="best", enable_version_counter=False, monitor="held_out_loss")]


def _validate_every_batches(config: TrainConfig, samples: int) -> int:
    """`validate_every_steps` in forward passes; a shorter training measures the held-out loss once, at its end."""
    epoch = math.ceil(samples / (config.batch_size * config.devices))
    steps = math.ceil(epoch / config.accumulate_grad_batches)  # an epoch's last step may have fewer forward passes
    whole, rest = divmod(config.max_steps or config.epochs * steps, steps)
    total = min(whole * epoch + rest * config.accumulate_grad_batches, config.epochs * epoch)
    return min(config.validate_every_steps * config.accumulate_grad_batches, total)


def _loggers(folder: Path) -> list[Logger]:
    """CSV and TensorBoard. Lightning deletes a CSV log that is there: that of an earlier start gets a number."""
    log = folder / "metrics.csv"
    if log.exists():
        log.rename(folder / f"metrics.{len(list(folder.glob('metrics.*.csv'))) + 1}.csv")
    return [CSVLogger(folder, name=None, version=""), TensorBoardLogger(folder, name=None, version="")]


def _settings(experiment: Experiment, alpha: float, cache: Manifest) -> dict[str, Any]:
    """What a trained model depends on; a model made with other settings is another model."""
    train = asdict(experiment.train)
    for only_looks in ("resume", "num_workers", "log_every_steps", "accelerator", "devices"):
        del train[only_looks]
    return {
        "student": asdict(experiment.student),
        "alpha": alpha,
        "train": train,
        "cache": {key: value for key, value in asdict(cache).items() if key not in ("made_with", "shard_samples")},
    }


def _is_done(folders: Folders, role: str, settings: dict[str, Any]) -> bool:
    folder = folders.model(role)
    if not folder.exists():
        return False
    if not (folder / _SETTINGS).exists():
        raise UserError(f"{folder}: not a {role} that was finished here: choose another --run_dir, or remove it")
    different = _differences(folder / _SETTINGS, settings)
    if different:
        raise UserError(
            f"{folder} was trained with other settings ({'; '.join(different)}): "
            f"choose another --run_dir, or remove {folder} and {folders.checkpoints(role)}"
        )
    return True


def _checkpoint_to_resume(folders: Folders, role: str, settings: dict[str, Any], resume: bool) -> Path | None:
    last = folders.checkpoints(role) / "last.ckpt"
    if not last.exists():
        return None
    different = _differences(folders.checkpoints(role) / _SETTINGS, settings)
    if different:
        raise UserError(
            f"{last} is of a training with other settings ({'; '.join(different)}): "
            f"choose another --run_dir, or remove {last.parent}"
        )
    if not resume:
        raise UserError(f"{last}: an unfinished training of this {role}: pass --resume to continue it, or remove it")
    say(f"{role}: continuing from {last}")
    return last


def _differences(path: Path, settings: dict[str, Any]) -> list[str]:
    """What differs between the settings on disk and ours, as `train.learning_rate: 0.1 there, 0.2 here`."""
    there, here = _flat(json.loads(path.read_text(encoding="utf-8"))), _flat(json.loads(json.dumps(settings)))
    return [
        f"{key}: {there.get(key)} there, {here.get(key)} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _checkpoint(student: Any, name: str) -> int:
    try:
        return checkpoint_blocks(student)
    except ValueError as error:
        raise UserError(f"{name}: {error}: leave --train.activation_checkpointing off") from None


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
