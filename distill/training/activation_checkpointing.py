"""Activation checkpointing for any student: the blocks of its longest list of equal blocks are recomputed."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial

import numpy as np
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(model: nn.Module, every_k: int = 1) -> int:
    """Make every k-th block of `model`, from the first on, keep only its inputs. Returns the number of such blocks.

    A recomputed block draws the same random numbers (dropout), numpy's and Python's too. Raises ValueError if there
    are no `blocks`.
    """
    if every_k < 1:
        raise ValueError(f"every {every_k}-th block: must be 1 or more")
    found = blocks(model)
    if found is None:
        raise ValueError("no nn.ModuleList of equal blocks found, so there is nothing to checkpoint")
    recomputed = [block for number, block in enumerate(found) if number % every_k == 0]
    for block in recomputed:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=_same_draws)
    return len(recomputed)


def _same_draws() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a block's forward and of its recomputation, in which numpy and Python draw alike.

    `checkpoint` itself does so for torch alone.
    """
    python, arrays = random.getstate(), np.random.get_state()

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        after = random.getstate(), np.random.get_state()
        random.setstate(python)
        np.random.set_state(arrays)
        try:
            yield
        finally:
            random.setstate(after[0])
            np.random.set_state(after[1])

    return contextlib.nullcontext(), again()


def blocks(model: nn.Module) -> list[nn.Module] | None:
    """Return the blocks: the longest `nn.ModuleList` whose elements are of one class, except lists inside elements.

    In most models these are the layers. A layer's experts are not, though they may be more. An element may be None. An
    element without a forward, such as a list of attention and MLP, is never run: its parts that have matrices are.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    elements = {found: [each for each in found._modules.values() if each is not None] for found in lists}
    inside = {module for found in lists for each in elements[found] for module in each.modules()}
    equal = [
        elements[found] for found in lists if found not in inside and len({type(each) for each in elements[found]}) == 1
    ]
    longest = max(equal, key=len, default=[])
    return [part for each in longest for part in _run(each)] or None


def _run(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the module, or if it has no forward, those of its parts that have one and a matrix."""
    if type(module).forward is not nn.Module.forward:
        yield module
        return
    for part in module.children():
        if any(parameter.dim() > 1 for parameter in part.parameters()):
            yield from _run(part)
