"""Lightning's Trainer, as every training here uses it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger

from distill.system import slurm
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
    loggers: list[Logger],
    callbacks: list[pl.Callback],
) -> pl.Trainer:
    """Make a Trainer that fits. README.md says which of its parts are off, and why.

    `precision`: Lightning's bf16-true would cast the batch too, including the targets' weights, and make bfloat16 the
    default type inside a step. Only the weights should be bfloat16, so cast the student.
    """
    options = slurm.trainer_options()
    plugins = [DurableCheckpoints(), *options.pop("plugins", [])]
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
        plugins=plugins,
        logger=loggers,
        callbacks=callbacks,
        **options,
    )
