"""What stands between a bad step and the weights: losses and gradients that are not finite, and lack of memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distill.errors import UserError
from distill.progress import say

IN_A_ROW = 10
"""Steps left out one after another at which a training ends: nothing is learned any more."""


@dataclass
class NonFinite:
    """A loss or gradient that is not finite ends the training, or costs that step, which is said and counted."""

    policy: Literal["stop", "skip"]
    skipped: int = 0
    in_a_row: int = 0

    def loss_is_fine(self, loss: float, step: int) -> bool:
        """Raises UserError unless the policy is to skip."""
        return math.isfinite(loss) or self._found(f"the loss is {loss}", step)

    def gradients_are_fine(self, norm: Tensor, gradients: Iterable[tuple[str, Tensor | None]], step: int) -> bool:
        """`norm` is that of all `gradients` (name, gradient). Raises UserError unless the policy is to skip."""
        if torch.isfinite(norm):
            self.in_a_row = 0
            return True
        # A norm can also overflow where no gradient does.
        named = (name for name, gradient in gradients if gradient is not None and not gradient.isfinite().all())
        return self._found(f"the gradient of {next(named, 'all weights together')} is not finite", step)

    def _found(self, what: str, step: int) -> bool:
        if self.policy == "stop":
            raise UserError(
                f"step {step}: {what}; the weights are as they were before it: lower --train.learning_rate or "
                "--train.gradient_clip and go on from the last checkpoint with --resume, or leave such steps out with "
                "--train.non_finite skip"
            )
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row == IN_A_ROW:
            raise UserError(f"step {step}: {what}, the {IN_A_ROW}th step in a row: lower --train.learning_rate")
        say(f"step {step}: {what}: left out ({self.skipped} so far)")
        return False


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a tensor found no room, on a card or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def too_large(micro_batch: int) -> UserError:
    """What it means when there is no smaller pass to try."""
    return UserError(
        f"out of memory with {micro_batch} sample{'s' * (micro_batch > 1)} a forward pass: use a smaller "
        "--train.batch_size, --train.activation_checkpointing true, a smaller --loss.chunk_size, a shorter "
        "--corpus.sequence_length or a smaller student"
    )
