"""Progress of a training: steps, loss, learning rate and memory."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from distill.system.progress import Progress


class ShowProgress(pl.Callback):
    """A callback that gives the progress display the steps, loss, learning rate and memory."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        self.progress.total = int(trainer.estimated_stepping_batches)
        self.progress.start(done=self._step)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        values = {
            "loss": "-" if pl_module.last_loss is None else f"{pl_module.last_loss:.3f}",
            "lr": f"{trainer.optimizers[0].param_groups[0]['lr']:.1e}",
        }
        if torch.cuda.is_available():
            values["GiB"] = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
        self.progress.advance(trainer.global_step - self._step, **values)
        self._step = trainer.global_step
