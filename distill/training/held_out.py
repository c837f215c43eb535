"""The held-out KL while the student trains, from cached targets without a teacher; the best weights are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from distill.losses.plausibility import implausible
from distill.system.progress import say
from distill.training.data import CacheDataModule


class MeasureHeldOut(pl.Callback):
    """A callback that measures at intervals and at the end, keeps the best weights, and stops early if asked to.

    Place it before the callback that writes checkpoints, which hold its state.

    Args:
        data: data module with the held-out samples.
        every_steps: optimiser steps between two measurements.
        monitor: `held_out_kl` or `held_out_loss`; lower is better.
        best: file for the best weights.
        patience: measurements without a new best that stop the training; None never stops it.
        qualifier: the ways in which the held-out KL is another than that of teacher and student (`kl_qualifier`).
    """

    def __init__(
        self,
        data: CacheDataModule,
        every_steps: int,
        monitor: str,
        best: Path,
        patience: int | None = None,
        qualifier: str = "",
    ) -> None:
        self.qualifier = qualifier
        self.data, self.every_steps, self.monitor, self.best, self.patience = data, every_steps, monitor, best, patience
        self.lowest = float("inf")
        self.measured, self.waited = 0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_early(trainer)  # a resumed training may have decided so before

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.steps_begun % self.every_steps == 0:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.measured != pl_module.steps_begun:
            self._measure(trainer, pl_module)

    def _measure(self, trainer: pl.Trainer, module: Any) -> None:
        values = module.measure(self.data.val_dataloader())
        self.measured = module.steps_begun
        if not values:
            return
        kl, loss = values["held_out_kl"], values["held_out_loss"]
        said = f" (the KL is {self.qualifier})" if self.qualifier else ""
        say(f"step {self.measured}: held-out KL {kl:.4f}, loss {loss:.4f} nats{said}")
        if module.objective.temperature == 1 and (
            doubt := implausible("student", values["held_out_nll"], values["teacher_nll"])
        ):
            say(f"step {self.measured}: {doubt}")
        for logger in trainer.loggers:
            logger.log_metrics(values, step=self.measured)
            logger.save()  # before the step's checkpoint, behind which a killed training goes on
        self.waited += 1
        if values[self.monitor] < self.lowest:
            self.lowest, self.waited = values[self.monitor], 0
            trainer.save_checkpoint(self.best, weights_only=True)
        self._stop_early(trainer)

    def _stop_early(self, trainer: pl.Trainer) -> None:
        if self.patience is not None and self.waited >= self.patience:
            say(f"stopping early: {self.waited} measurements without a lower {self.monitor} than {self.lowest:.4f}")
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"lowest": self.lowest, "measured": self.measured, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.lowest, self.measured, self.waited = (state_dict[key] for key in ("lowest", "measured", "waited"))
