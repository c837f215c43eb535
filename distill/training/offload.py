"""Large activations in host memory until the backward pass needs them; weights stay on the card."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from distill.errors import UserError

LARGE = 2**20
"""Smallest size in bytes of a tensor that is worth the way to the host and back."""


class _Kept(NamedTuple):
    tensor: Tensor
    version: int


class _Moved(NamedTuple):
    host: Tensor
    device: torch.device


def offload_activations(module: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which a card's activations go to pinned host memory instead of staying for the backward pass.

    Weights of `module` stay; the copies of weights that autocast makes are activations. The copies are queued after the
    kernels that make the tensors and before those that need them, so only the card's own queue waits.
    """
    return saved_on_host(module, large=LARGE, pin_memory=True)


def saved_on_host(module: nn.Module, *, large: int, pin_memory: bool) -> AbstractContextManager[Any]:
    """Return a context in which tensors of `large` bytes or more are copied to the host until backward asks for them.

    `torch.autograd.graph.save_on_cpu` would copy the weights too: a linear layer saves its weight, which an optimiser
    or another layer keeps on the card anyway.
    """
    weights = {parameter.untyped_storage()._cdata for parameter in module.parameters()}  # differs without memory too

    def pack(tensor: Tensor) -> _Kept | _Moved:
        if tensor.nbytes < large or tensor.untyped_storage()._cdata in weights:
            return _Kept(tensor, tensor._version)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, layout=tensor.layout, pin_memory=pin_memory)
        return _Moved(host.copy_(tensor, non_blocking=pin_memory), tensor.device)

    def unpack(saved: _Kept | _Moved) -> Tensor:
        if isinstance(saved, _Moved):
            return saved.host.to(saved.device, non_blocking=pin_memory)
        # torch does not check the versions of tensors saved by hooks.
        assert saved.tensor._version == saved.version, "a tensor that backward needs was changed since"
        return saved.tensor

    return saved_tensors_hooks(pack, unpack)


def check_offload(device_type: str) -> None:
    """Raise UserError if there is no other memory than the host's."""
    if device_type != "cuda":
        raise UserError(
            f"train.offload_activations: needs a CUDA device; on {device_type} activations are in host memory already"
        )
