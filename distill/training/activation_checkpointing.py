"""Activation checkpointing for any student: the blocks of its longest list of equal blocks are recomputed."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(model: nn.Module, every_k: int = 1) -> int:
    """Make every k-th block of `model`, from the first on, keep only its inputs; returns the number of those blocks.

    The blocks are the elements of the longest `nn.ModuleList` whose elements are of one class: every family's layers.
    What a block draws at random (dropout) it draws again. Raises ValueError when there are no blocks.
    """
    if every_k < 1:
        raise ValueError(f"every {every_k}-th block: must be 1 or more")
    found = blocks(model)
    if found is None:
        raise ValueError("no nn.ModuleList of equal blocks found, so there is nothing to checkpoint")
    recomputed = [block for number, block in enumerate(found) if number % every_k == 0]
    for block in recomputed:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return len(recomputed)


def blocks(model: nn.Module) -> nn.ModuleList | None:
    """The longest list of modules of one class: every family's layers."""
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(block) for block in module}) == 1
    ]
    return max(lists, key=len) if lists else None
