"""Lightning's Trainer as every training here uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from distill.processes import is_first_process
from distill.training.checkpoints import DurableCheckpoints
from distill.training.parallel import make_strategy


def make_trainer(
    *,
    accelerator: str,
    devices: int,
    num_nodes: int,
    strategy: str,
    precision: Any,
    epochs: int,
    max_steps: int | None,
    log_every_steps: int,
    logs: Path,
    callbacks: list[pl.Callback],
) -> pl.Trainer:
    """A Trainer that fits. Accumulation and clipping are the module's; the held-out measurement is a callback's.

    `precision`: Lightning's bf16-true would cast the batch too, the targets' weights among it, and make bfloat16 the
    default type inside a step. Weights in bfloat16 are all that is wanted: cast the student.
    """
    return pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=make_strategy(strategy, devices * num_nodes),
        precision="32-true" if precision == "bf16-true" else precision,
        max_epochs=epochs,
        max_steps=max_steps or -1,
        limit_val_batches=0,
        log_every_n_steps=log_every_steps,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        plugins=[DurableCheckpoints()],
        logger=_loggers(logs),
        callbacks=callbacks,
    )


def _loggers(folder: Path) -> list[Logger]:
    """CSV and TensorBoard. Lightning deletes a CSV log that is there: that of an earlier start gets a number."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "metrics.csv"
    if log.exists() and is_first_process():
        taken = [int(old.suffixes[0][1:]) for old in folder.glob("metrics.*.csv") if old.suffixes[0][1:].isdigit()]
        log.rename(folder / f"metrics.{max(taken, default=0) + 1}.csv")
    return [CSVLogger(folder, name=None, version=""), TensorBoardLogger(folder, name=None, version="")]
