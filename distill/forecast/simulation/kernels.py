"""Memory that kernels take for themselves while they run, on a CPU and on a CUDA device: no dispatch mode sees it.

Read off torch's and bitsandbytes' sources; tests/benchmarks/forecast_accuracy.py compares with what is really taken.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

DeviceKind = Literal["cpu", "cuda"]
aten = torch.ops.aten

CUBLAS_BYTES = 8_519_680
"""cuBLAS' workspace, which torch takes from its allocator at the first product and keeps (32 MiB on Hopper)."""


def workspace(func: Any, args: Any, kwargs: Any, made: Any, device: DeviceKind) -> int:
    """Return the bytes that a kernel takes beside its results, and gives back."""
    packet = func._overloadpacket
    if packet.__name__ == "gemm_4bit":
        return _dequantized(args)
    if packet in _WORKSPACES:
        return _WORKSPACES[packet](args, made, device)
    if packet in (aten.sum, aten.cumsum) and kwargs.get("dtype") not in (None, args[0].dtype):
        # A reduction in a wider type reads a copy in it; on CUDA the sum's kernel casts what it reads.
        return 0 if device == "cuda" and packet is aten.sum else args[0].numel() * kwargs["dtype"].itemsize
    return _casts(args, made) if device == "cpu" and torch.Tag.pointwise in func.tags else 0


LOOKUP_BYTES = 16
"""A processor dequantises weight by weight, each in the time in which it would move so many bytes (an estimate, by the
times of teachers in bfloat16 and in 4 bits in tests/benchmarks/forecast_accuracy.py)."""


def moved_in_workspace(func: Any, args: Any, size: int, device: DeviceKind) -> int:
    """Return the bytes that a kernel moves beside arguments and results: it writes and reads a workspace of `size`."""
    if func._overloadpacket.__name__ == "gemm_4bit" and device == "cpu":
        return LOOKUP_BYTES * prod(args[2])
    return 2 * size


def _casts(args: Any, made: Any) -> int:
    """Return the copies of a CPU's pointwise kernel, which works in one type: arguments and results of another type."""
    tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.dim()]
    if len(tensors) < 2 or len({tensor.dtype for tensor in tensors}) == 1 or not isinstance(made, Tensor):
        return 0
    wide = tensors[0].dtype
    for tensor in tensors[1:]:
        wide = torch.promote_types(wide, tensor.dtype)
    copied = [tensor for tensor in tensors if tensor.dtype != wide]
    if made.dtype not in (wide, torch.bool):
        copied.append(made)
    return sum(tensor.numel() * wide.itemsize for tensor in copied)


def _dequantized(args: Any) -> int:
    """Return the weight in the type of the input, and its scales twice in float32 (before and after their offset).

    On CUDA bitsandbytes' fused kernel does without where there are few rows, which a pass over a batch never has.
    """
    given, weights, scales = args[0], prod(args[2]), prod(args[2]) // args[4]
    return weights * given.element_size() + 4 * scales


def _whole(args: Any, made: Any, device: DeviceKind) -> int:
    """Return as much again as goes in: `logsumexp` makes exp(x - max), `vecdot` the products."""
    return int(args[0].nbytes)


def _attention_backward(args: Any, made: Any, device: DeviceKind) -> int:
    """Return what CUDA's flash kernel needs to add up the queries' gradient in float32, beside one number a row."""
    grad_BHLE: Tensor = args[0]
    return 0 if device == "cpu" else 4 * grad_BHLE.numel() + 4 * grad_BHLE.numel() // grad_BHLE.shape[-1]


def _masked_index(args: Any, made: Any, device: DeviceKind) -> int:
    """Return the positions that a mask becomes: one int64 for each of its dimensions."""
    masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
    return sum(8 * mask.dim() * made.shape[0] for mask in masks)


def _sorted(args: Any, made: Any, device: DeviceKind) -> int:
    """Return the buffer in which CUDA sorts, with int64 positions beside."""
    return 0 if device == "cpu" else sum(result.nbytes for result in made)


_WORKSPACES: dict[Any, Callable[[Any, Any, DeviceKind], int]] = {
    aten.logsumexp: _whole,
    aten.linalg_vecdot: _whole,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.index: _masked_index,
    aten.sort: _sorted,
}
