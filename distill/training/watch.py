"""Looks at a training that are taken once: its first loss, and a probe for leaks when the weights have moved."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.models.isolation import find_fault
from distill.system.progress import say

PROBE_LENGTH = 256
"""Tokens of a probe's row at most: six such rows fit where a step's passes do."""
LOOK = 10
"""Steps after which lost steps are told."""
FEW = 2**14
"""Values of a parameter, about, that are looked at for that."""
TOO_HIGH = 1.5
"""Shares of ln V (V tokens) above which a first loss is no start."""


class ProbeAgain(pl.Callback):
    """A second probe of the student, at the first validation: a branch that began at zero takes part now.

    Place it before what measures and keeps the best weights. Raises UserError when the student breaks the contract.

    Args:
        name: the student's, for the message.
        pack: documents share rows.
        length: tokens of a sample.
        every_steps: optimiser steps between two validations.
    """

    def __init__(self, name: str, vocab_size: int, pack: bool, length: int, every_steps: int) -> None:
        self.name, self.vocab_size, self.pack, self.every_steps = name, vocab_size, pack, every_steps
        self.length = min(length, PROBE_LENGTH)
        self.is_done = False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.is_done and pl_module.steps_begun % self.every_steps == 0:
            self._probe(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not self.is_done:
            self._probe(trainer, pl_module)

    def _probe(self, trainer: pl.Trainer, module: Any) -> None:
        with trainer.precision_plugin.val_step_context():
            # All devices make the same passes: under fsdp each pass gathers weights from all of them.
            fault = find_fault(
                module.student, self.vocab_size, module.device, pack=self.pack, length=self.length, perturb=False
            )
        if fault is not None:
            raise UserError(f"step {module.steps_begun}: {self.name}: {fault.value}")
        self.is_done = True


class TellOfLostSteps(pl.Callback):
    """A line after the first steps: the share of bfloat16 weights that did not move when rounded to the nearest.

    An embedding takes no part, because most of its rows have no gradient in a step.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.before: list[tuple[Tensor, Tensor]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if pl_module.steps_begun:
            return  # a resumed training
        modules = pl_module.student.modules()
        tables = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
        self.before = [
            (parameter, _some(parameter).clone())
            for parameter in pl_module.student.parameters()
            if parameter.requires_grad and parameter.dtype == torch.bfloat16 and id(parameter) not in tables
        ]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.steps_begun == LOOK:
            self._tell(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._tell(trainer, pl_module)

    def _tell(self, trainer: pl.Trainer, module: Any) -> None:
        same = [_some(parameter) == before for parameter, before in self.before]
        seen, self.before = sum(each.numel() for each in same), []
        if seen:
            share = sum(int(each.sum()) for each in same) / seen
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            say(
                f"{self.name}: {share:.1%} of the weights did not move in the first {module.steps_begun} steps "
                f"(learning rate {rate:.1e} now): rounded to the nearest, a bfloat16 weight loses every step below "
                "half its last digit; --train.rounding stochastic or kahan loses none"
            )


def _some(parameter: Tensor) -> Tensor:
    """Return a few values, evenly spread, of this device's part of a parameter."""
    own: Tensor = getattr(parameter, "_local_tensor", parameter).detach().flatten()
    return own[:: max(1, own.numel() // FEW)]


class WarnOfFirstLoss(pl.Callback):
    """A line when the loss of the very first step is worse than that of a student that knows nothing, ln V."""

    def __init__(self, name: str, vocab_size: int) -> None:
        self.name, self.uniform = name, math.log(vocab_size)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        metrics = trainer.callback_metrics
        if pl_module.steps_begun != 1 or "loss" not in metrics:
            return
        loss = float(metrics["loss"]) - float(metrics.get("auxiliary_loss", 0.0))
        if loss > TOO_HIGH * self.uniform:
            say(
                f"{self.name}: the first loss is {loss:.1f} nats, where a student that knows nothing has "
                f"{self.uniform:.1f} (ln of the number of tokens): its logits begin too large, and the first steps go "
                "into that (a fresh one whose embedding is its head too: begin with a std of 0.02 there)"
            )
