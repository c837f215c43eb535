"""What happens beside the steps: progress, and an orderly stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from distill import interrupt
from distill.progress import Progress, say


class ShowProgress(pl.Callback):
    """Feeds the progress display with steps, loss, learning rate and memory, and says each held-out measurement."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        self.progress.total = int(trainer.estimated_stepping_batches)
        self.progress.start(done=self._step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        values = {
            "loss": f"{trainer.callback_metrics['loss']:.3f}" if "loss" in trainer.callback_metrics else "-",
            "lr": f"{trainer.optimizers[0].param_groups[0]['lr']:.1e}",
        }
        if torch.cuda.is_available():
            values["GiB"] = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
        self.progress.advance(trainer.global_step - self._step, **values)
        self._step = trainer.global_step

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        if not trainer.sanity_checking and "held_out_kl" in metrics:
            say(
                f"step {trainer.global_step}: held-out KL {metrics['held_out_kl']:.4f}, "
                f"loss {metrics['held_out_loss']:.4f} nats"
            )


class StopWhenAsked(pl.Callback):
    """After Ctrl-C or SIGTERM: finish the optimiser step, save a checkpoint, stop.

    Not in the middle of an accumulation: its gradients are not in a checkpoint, and the step would lack them.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        interrupt.retake()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if stepped and interrupt.asked():
            trainer.save_checkpoint(self.checkpoint, weights_only=False)
            interrupt.stop_if_asked()
