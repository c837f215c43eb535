"""Micro-batches of forward passes, which halve when a model runs out of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from distill.errors import UserError
from distill.models.language_model import LanguageModel, hidden_states
from distill.system.memory import free_memory, is_out_of_memory
from distill.system.progress import say

Row = TypeVar("Row")
Answer = TypeVar("Answer")


class MicroBatches:
    """A model's hidden states, in forward passes of at most `size` samples; `size` halves when memory runs out."""

    def __init__(self, model: LanguageModel, size: int) -> None:
        self.model, self.size = model, size

    @torch.no_grad()
    def hidden_states(self, input_ids_BL: Tensor, position_ids_BL: Tensor) -> Tensor:
        """Return the hidden states `[B, L, D]` of a batch. Raises UserError if one sample alone finds no room."""
        while True:
            try:
                passes = zip(input_ids_BL.split(self.size), position_ids_BL.split(self.size), strict=True)
                hidden = [hidden_states(self.model, ids_BL, positions_BL) for ids_BL, positions_BL in passes]
                return hidden[0] if len(hidden) == 1 else torch.cat(hidden)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                before = min(self.size, len(input_ids_BL))
                if before == 1:
                    raise no_room(input_ids_BL.shape[1]) from None
            free_memory()  # outside of `except`, which holds the tensors of the failed pass
            self.size = -(-before // 2)
            say(f"out of memory with {before} samples a forward pass; from here on {self.size}")


def in_halves(rows: list[Row], work: Callable[[list[Row]], list[Answer]]) -> list[Answer]:
    """Return `work(rows)`, an answer a row; when memory runs out, the answers of one half of the rows after the other.

    Raises the error of `work` if one row alone finds no room.
    """
    try:
        return work(rows)
    except Exception as error:
        if len(rows) == 1 or not is_out_of_memory(error):
            raise
    free_memory()
    middle = len(rows) // 2
    say(f"out of memory with {len(rows)} texts at once: {middle} and {len(rows) - middle} come one after the other")
    return [*in_halves(rows[:middle], work), *in_halves(rows[middle:], work)]


def no_room(length: int) -> UserError:
    """Return the error for a pass that cannot be halved any more."""
    return UserError(
        f"out of memory with 1 sample of {length} tokens a forward pass; everything so far is kept: free the "
        "device from other programs, load the model in fewer bits (--teacher.quantization nf4), or take a teacher that "
        "needs less memory (--teacher.class_path streamed) or a smaller --corpus.sequence_length in a new cache"
    )
