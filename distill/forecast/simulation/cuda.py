"""What runs otherwise on a CUDA device than on a CPU, put in its place while fake CPU tensors stand for a card's."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from distill.cache.reading.batches import Batch
from distill.training import offload
from distill.training.optimizers import adamw, paged


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Inside, attention, norms and optimisers allocate what they do on a CUDA device."""
    with ExitStack() as stack:
        # torch's optimisers take all parameters at once there, with a temporary as large as all of them.
        adam = importlib.import_module("torch.optim.adam")  # AdamW's too; hidden behind a name of torch.optim
        stack.enter_context(mock.patch.object(adam, "_default_to_fused_or_foreach", _foreach))
        stack.enter_context(mock.patch.object(adamw, "check_optimizer", lambda *args, **kwargs: None))
        stack.enter_context(mock.patch.object(paged, "PagedAdamW8bit", _Paged))
        stack.enter_context(mock.patch.object(offload, "saved_on_host", _saved_on_host))
        stack.enter_context(mock.patch.object(Batch, "to", _copied))
        stack.enter_context(_Functions())
        yield


def _foreach(parameters: Any, differentiable: bool, use_fused: bool = False) -> tuple[bool, bool]:
    return False, not differentiable


class _Paged(torch.optim.Optimizer):
    """Its moments lie outside of torch's allocator, in memory that moves to the host; the update makes nothing."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    def step(self, closure: Any = None) -> Any:
        return None if closure is None else closure()


def _copied(batch: Any, device: torch.device) -> Any:
    """A batch waits on the host; what a pass needs of it is copied to the card."""
    if isinstance(batch, Tensor):
        return batch.clone()
    if not is_dataclass(batch) or isinstance(batch, type):
        return batch
    return replace(batch, **{field.name: _copied(getattr(batch, field.name), device) for field in fields(batch)})


def _saved_on_host(module: nn.Module, *, large: int, pin_memory: bool) -> saved_tensors_hooks:
    """As the real one, which tells weights by their addresses and copies nothing where host and card are one device."""
    weights = {parameter.untyped_storage()._cdata for parameter in module.parameters()}

    def pack(tensor: Tensor) -> tuple[Tensor, bool]:
        moved = tensor.nbytes >= large and tensor.untyped_storage()._cdata not in weights
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) if moved else tensor
        return host, moved

    def unpack(saved: tuple[Tensor, bool]) -> Tensor:
        tensor, moved = saved
        return tensor.clone() if moved else tensor

    return saved_tensors_hooks(pack, unpack)


class _Functions(TorchFunctionMode):
    """The functions whose CUDA kernels are of another kind."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(func, *args, **kwargs)
        if func in (torch.rms_norm, torch.nn.functional.rms_norm):
            return _rms_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    func: Any,
    query_BHLE: Tensor,
    key_BHLE: Tensor,
    value_BHLE: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Dropout needs no memory there; float32 with shared keys finds no other kernel than that with all L x L scores."""
    scores = kwargs.get("enable_gqa", False) and query_BHLE.dtype == torch.float32
    with sdpa_kernel([SDPBackend.MATH]) if scores else sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        return func(query_BHLE, key_BHLE, value_BHLE, attn_mask, 0.0, is_causal, **kwargs)


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """One kernel, in the wider of the two types; a float32 number a row is kept for its backward."""
    return _RMSNorm.apply(input, weight, len(normalized_shape))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, dimensions: int) -> Tensor:
        rows = input.shape[: input.dim() - dimensions]
        ctx.save_for_backward(input, weight, input.new_empty((*rows, *(1,) * dimensions), dtype=torch.float32))
        dtype = input.dtype if weight is None else torch.promote_types(input.dtype, weight.dtype)
        return torch.empty_like(input, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, _ = ctx.saved_tensors
        return torch.empty_like(input), None if weight is None else torch.empty_like(weight), None
