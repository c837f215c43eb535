"""Guards of the weights: a step whose loss or gradient is not finite is left out or ends the training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from distill.errors import UserError
from distill.system.progress import say

IN_A_ROW = 20
"""Steps left out one after another that end a training, because it learns nothing any more."""


@dataclass
class NonFinite:
    """A policy for a loss or gradient that is not finite: end the training, or leave that step out and count it."""

    policy: Literal["stop", "skip"]
    skipped: int = 0
    in_a_row: int = 0

    def step_is_fine(self, loss: float, norm: float | None, student: nn.Module, step: int) -> bool:
        """Return False for a step to leave out. Raise UserError for one that must not go on.

        `norm` is that of all gradients; None leaves them to the scaler of float16. A norm can also overflow where no
        gradient does.
        """
        if not math.isfinite(loss):
            return self._found(f"the loss is {loss}", step)
        if norm is None:
            return True
        if math.isfinite(norm):
            self.in_a_row = 0
            return True
        gradients = ((name, parameter.grad) for name, parameter in student.named_parameters())
        named = (name for name, gradient in gradients if gradient is not None and not gradient.isfinite().all())
        return self._found(f"the gradient of {next(named, 'all weights together')} is not finite", step)

    def _found(self, what: str, step: int) -> bool:
        if self.policy == "stop":
            raise UserError(
                f"step {step}: {what}; it has not reached the weights: leave such steps out, going on from the last "
                "checkpoint with --resume --train.non_finite skip, or train anew with a lower --train.learning_rate"
            )
        self._leave_out(what, step)
        return False

    def overflowed(self, is_left_out: bool, step: int) -> None:
        """Note after each step under float16 if the loss's scale was too large, which is normal now and then.

        Raises UserError if it never fits.
        """
        if is_left_out:
            self._leave_out("a gradient is beyond float16", step)
        else:
            self.in_a_row = 0

    def _leave_out(self, what: str, step: int) -> None:
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row == IN_A_ROW:
            raise UserError(
                f"step {step}: {what}, the {IN_A_ROW}th step in a row: train anew with a lower --train.learning_rate, "
                "or --train.precision bf16-mixed"
            )
        say(f"step {step}: {what}: left out ({self.skipped} so far)")


def too_large(micro_batch: int) -> UserError:
    """Return the error for a pass that cannot be halved any more."""
    samples = f"{micro_batch} sample{'s' * (micro_batch > 1)}"
    return UserError(
        f"out of memory with {samples} a forward pass; everything so far is kept: go on with --resume and half of "
        "--train.batch_size with twice the --train.accumulate_grad_batches, --train.activation_checkpointing or a "
        "smaller --loss.chunk_size, or train a smaller student"
    )
