"""Kernels and optimisers of a CUDA device, for fake CPU tensors that stand for a card's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from distill.forecast.simulation.values import copy_values
from distill.training.optimizers.step_in_backward import StepInBackward


class Functions(TorchFunctionMode):
    """A mode in which attention, norms and copies behave as on a CUDA device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(func, *args, **kwargs)
        if func in (torch.rms_norm, torch.nn.functional.rms_norm):
            return _rms_norm(*args, **kwargs)
        if kwargs.get("non_blocking") and func is Tensor.to:  # from the host: a batch, or offloaded activations
            return args[0].clone()
        if kwargs.get("non_blocking") and func is Tensor.copy_:  # to the host
            return args[0]
        if func is Tensor.cpu:  # a copy that the tracker counts as the host's, as it is pinned
            return copy_values(args[0], torch.empty_like(args[0], pin_memory=True))
        return func(*args, **kwargs)


def optimizer_on_cuda(make: Callable[[nn.Module], torch.optim.Optimizer], module: nn.Module) -> torch.optim.Optimizer:
    """Make an optimiser that allocates as on a CUDA device.

    torch's optimisers that are not fused take all parameters at once there, with a temporary as large as all of them.
    """
    optimizer = make(module)
    for group in optimizer.param_groups:
        if "foreach" in group and not group.get("fused"):
            group["foreach"] = True
    if isinstance(optimizer, StepInBackward) and getattr(optimizer.optimizer, "is_paged", False):
        optimizer.optimizer = _Paged(optimizer.param_groups)
    return _Paged(optimizer.param_groups) if getattr(optimizer, "is_paged", False) else optimizer


class _Paged(torch.optim.Optimizer):
    """Optimiser whose moments lie outside of torch's allocator, in memory that moves to the host."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    def step(self, closure: Any = None) -> Any:
        """Do nothing."""
        return None if closure is None else closure()


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
    """Choose the kernel of a CUDA device: no memory for dropout; all L x L scores for shared float32 keys."""
    scores = kwargs.get("enable_gqa", False) and query_BHLE.dtype == torch.float32
    with sdpa_kernel([SDPBackend.MATH]) if scores else sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        return func(query_BHLE, key_BHLE, value_BHLE, attn_mask, 0.0, is_causal, **kwargs)


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Run one kernel, in the wider of the two types. It keeps a float32 number a row for its backward."""
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
