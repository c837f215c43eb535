"""Activation checkpointing for any student: the blocks of its longest list of equal blocks are recomputed."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(model: nn.Module, every_k: int = 1) -> int:
    """Make every k-th block of `model`, from the first on, keep only its inputs. Returns the number of such blocks.

    A recomputed block draws the same random numbers (dropout). Raises ValueError if there are no `blocks`.
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
    """Return the longest `nn.ModuleList` whose elements are of one class, except lists inside other lists' elements.

    In most models these are the layers. A layer's experts are not, though they may be more.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inside = {module for outer in lists for block in outer for module in block.modules()}
    equal = [blocks for blocks in lists if blocks not in inside and len({type(block) for block in blocks}) == 1]
    return max(equal, key=len) if equal else None
