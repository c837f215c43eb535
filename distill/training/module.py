"""The student under Lightning: the fused loss, and the reduction that no micro-batch, accumulation or device changes.

Shapes: B batch, L sequence length, N positions with loss, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from distill.cache.batches import Batch, HiddenTargets
from distill.losses.divergences import ChunkTarget, DenseChunk, Mixture, SparseChunk
from distill.losses.fused import fused_loss
from distill.models.language_model import Head
from distill.targets.extract import next_ids
from distill.training.optimizer import Schedule, adamw


class DistillationModule(pl.LightningModule):
    """Trains `student` (body and head) on batches of a cache.

    The loss of an optimiser step is the sum over all its positions divided by their number: micro-batches and devices
    with few positions count as little as they should. The number is known only when the step's last micro-batch has
    been seen, so backward passes use a fixed nominal number and the gradients are rescaled once, before clipping.

    Args:
        student: an nn.Module with `body` and `head`.
        vocab_size: real tokens of the tokenizer.
        divergence: what to minimise, for example `Mixture(alpha=0)`.
        chunk_size: positions whose logits exist at one time.
        make_schedule: number of optimiser steps -> learning rate schedule.
        learning_rate, weight_decay, betas: AdamW's.
        teacher_head: the teacher's head, for a cache of hidden states.
        nominal_positions: positions of a full micro-batch (batch size times sequence length).
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        vocab_size: int,
        divergence: Mixture,
        chunk_size: int,
        nominal_positions: int,
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float],
        make_schedule: Callable[[int], Schedule],
        teacher_head: Head | None = None,
    ) -> None:
        super().__init__()
        self.student: Any = student
        self.vocab_size, self.divergence, self.chunk_size = vocab_size, divergence, chunk_size
        self.nominal_positions = nominal_positions
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, betas
        self.make_schedule = make_schedule
        self.teacher_head = teacher_head
        # Plain attributes: a buffer would be rounded to the module's precision under bf16-true.
        self._step_sums = torch.zeros(2)
        self._held_out_sums = torch.zeros(3)

    def _target_and_hidden(self, batch: Batch) -> tuple[ChunkTarget, Tensor]:
        true_ids_N, targets = next_ids(batch.input_ids_BL, batch.loss_mask_BL), batch.targets
        target: ChunkTarget
        if isinstance(targets, HiddenTargets):
            assert self.teacher_head is not None, "a cache of hidden states comes with the teacher's head"
            head = self.teacher_head.to(targets.hidden_ND.device)
            target = DenseChunk(targets.hidden_ND, head, true_ids_N, self.divergence.temperature)
        else:
            target = SparseChunk(targets.ids_NK, targets.weights_NK, batch.entropy_N, true_ids_N, targets.rest_N)
        hidden_BLD = self.student.body(batch.input_ids_BL, batch.position_ids_BL)
        return target, hidden_BLD[batch.loss_mask_BL]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        target, hidden_ND = self._target_and_hidden(batch)
        head = self.student.head.with_rows(self.vocab_size)
        loss = fused_loss(hidden_ND, head, target, self.divergence, self.chunk_size)
        self._step_sums = self._step_sums.to(loss.device) + _sums(loss.detach(), positions=len(hidden_ND))
        return loss / self.nominal_positions

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the summed gradients by the positions of the whole step, on all devices."""
        loss_sum, positions = self._reduced(self._step_sums)
        if positions > 0:
            # Lightning divided by the accumulation, ddp by the number of devices; both are undone here.
            divided_by = self.nominal_positions * self.trainer.accumulate_grad_batches * self.trainer.world_size
            gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, divided_by / positions)
            self.log("loss", loss_sum / positions, prog_bar=True)
        self._step_sums = torch.zeros(2)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        target, hidden_ND = self._target_and_hidden(batch)
        head = self.student.head.with_rows(self.vocab_size)
        sums = [
            fused_loss(hidden_ND, head, target, divergence, self.chunk_size)
            for divergence in (Mixture(0, self.divergence.temperature), self.divergence)
        ]
        self._held_out_sums = self._held_out_sums.to(sums[0].device) + _sums(*sums, positions=len(hidden_ND))

    def on_validation_epoch_end(self) -> None:
        kl, loss, positions = self._reduced(self._held_out_sums)
        self._held_out_sums = torch.zeros(3)
        if positions > 0:
            self.log_dict({"held_out_kl": kl / positions, "held_out_loss": loss / positions})

    def _reduced(self, sums: Tensor) -> list[float]:
        return self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum").tolist()

    def configure_optimizers(self) -> Any:
        optimizer = adamw(self.student, self.learning_rate, self.weight_decay, self.betas)
        schedule = self.make_schedule(int(self.trainer.estimated_stepping_batches))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _sums(*losses: Tensor, positions: int) -> Tensor:
    return torch.stack([*(loss.float() for loss in losses), torch.tensor(float(positions), device=losses[0].device)])
