"""Noise on a model's weights for a while, so that branches which begin at zero take part in a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.system import interrupt

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The types of weights that are moved; quantised ones stay, and only trained weights are quantised."""
SMALL = 1 << 18
"""Elements of a tensor that is moved as a whole; of a larger one only the slices that do nothing yet."""
NOTHING = 1e-3
"""Largest absolute weight of a slice that does nothing yet: an initial layer scale (1e-6 to 1e-4), or zeros."""


@dataclass(frozen=True)
class _Saved:
    """The slices of one tensor as they were: all of it, or `index` along dimension `dim`."""

    data: Tensor
    values: Tensor
    dim: int = 0
    index: Tensor | None = None

    def restore(self) -> None:
        if self.index is None:
            self.data.copy_(self.values)
        else:
            self.data.index_copy_(self.dim, self.index, self.values)


@contextmanager
def perturbed(model: nn.Module) -> Iterator[None]:
    """Add noise to the weights of `model` inside; put them back, bit for bit, at the end and after any exception.

    A zero-initialised branch (a residual block's last matrix, LoRA's B, a layer scale, RWKV's outputs) hides whatever
    it computes from the model's answers. Every small tensor gets noise, and so does every row and column of a large
    one that is zero or nearly so; a trained matrix stays, which keeps the copies far smaller than the weights.
    Weights without memory stay too. Noise is 0.3 / sqrt(fan-in) for matrices and 0.1 for vectors, alike in each call.
    """
    generator = torch.Generator().manual_seed(0)
    saved: list[_Saved] = []
    try:
        with torch.no_grad():
            for parameter in model.parameters():
                data = parameter.data
                if type(data) is Tensor and data.dtype in DTYPES and not data.is_meta and data.numel():
                    _move(data, saved, generator)
        yield
    finally:
        with torch.no_grad(), interrupt.held_back():
            for slices in reversed(saved):
                slices.restore()


def _move(data: Tensor, saved: list[_Saved], generator: torch.Generator) -> None:
    """Add noise to one tensor, or to its slices that do nothing; the old values go to `saved` first."""
    std = 0.3 / (data.numel() / len(data)) ** 0.5 if data.dim() > 1 else 0.1
    if data.numel() <= SMALL:
        saved.append(_Saved(data, data.clone()))
        data.add_(_noise(data.shape, std, generator, data))
        return
    found = []
    for dim in range(min(data.dim(), 2)):
        others = tuple(other for other in range(data.dim()) if other != dim)
        largest = torch.linalg.vector_norm(data, torch.inf, dim=others) if others else data.abs()
        found.append((largest < NOTHING).nonzero().flatten())
        if len(found[0]) == len(data):
            break  # all rows do nothing: that is all columns too
    for dim, index in enumerate(found):
        values = data.index_select(dim, index)
        saved.append(_Saved(data, values, dim, index))
        data.index_add_(dim, index, _noise(values.shape, std, generator, data))


def _noise(shape: torch.Size, std: float, generator: torch.Generator, like: Tensor) -> Tensor:
    return (torch.randn(shape, generator=generator) * std).to(like)
