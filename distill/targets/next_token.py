"""The next-token shift: the true next token of every position with loss."""

from __future__ import annotations

from torch import Tensor


def next_ids(input_ids_BL: Tensor, loss_mask_BL: Tensor) -> Tensor:
    """Return `[N]`, the true next token of every position with loss, row after row."""
    return input_ids_BL.roll(-1, dims=-1)[loss_mask_BL]
