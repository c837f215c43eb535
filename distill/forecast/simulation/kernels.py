"""Memory that kernels allocate for themselves while they run, on a CPU and on a CUDA device, unseen by dispatch modes.

The figures are read off torch's and bitsandbytes' sources. tests/benchmarks/forecast_accuracy.py compares them with
real memory.
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
"""Size of cuBLAS' workspace, which torch takes from its allocator at the first product and keeps (32 MiB on Hopper)."""


def workspace(func: Any, args: Any, kwargs: Any, made: Any, device: DeviceKind) -> int:
    """Return the bytes that a kernel takes beside its results, and gives back."""
    packet = func._overloadpacket
    if packet.__name__ == "gemm_4bit":
        return _dequantized(args)
    if packet in _WORKSPACES:
        return _WORKSPACES[packet](args, made, device)
    if packet in (aten.sum, aten.cumsum) and kwargs.get("dtype") not in (None, args[0].dtype):
        # A reduction in a wider type reads a copy in it; on CUDA the sum's kernel casts while it reads.
        return 0 if device == "cuda" and packet is aten.sum else args[0].numel() * kwargs["dtype"].itemsize
    return _casts(args, made) if device == "cpu" and torch.Tag.pointwise in func.tags else 0


def grouped_product(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Return an empty tensor of the size and strides of a result of torch's `_grouped_mm`.

    Its rows begin at multiples of 16 bytes. The groups, such as a mixture's experts, share the rows of a 2-D `a`, the
    columns of a 2-D `b`, or the sums of both. The result is as large however they share them.
    """
    dtype = out_dtype or a.dtype
    rows, columns, granule = a.shape[-2], b.shape[-1], 16 // dtype.itemsize
    stride = -(-columns // granule) * granule
    if a.dim() != b.dim():
        return torch.empty_strided((rows, columns), (stride, 1), dtype=dtype)
    groups = a.shape[0] if offs is None else offs.shape[0]
    return torch.empty_strided((groups, rows, columns), (rows * stride, stride, 1), dtype=dtype)


LOOKUP_BYTES = 16
"""Bytes that a processor could move in the time in which it dequantises one weight (an estimate, by the times of
teachers in bfloat16 and in 4 bits in tests/benchmarks/forecast_accuracy.py).
"""


def moved_in_workspace(func: Any, args: Any, size: int, device: DeviceKind) -> int:
    """Return the bytes that a kernel moves beside arguments and results: it writes and reads its workspace."""
    if func._overloadpacket.__name__ == "gemm_4bit" and device == "cpu":
        return LOOKUP_BYTES * prod(args[2])
    return 2 * size


def _casts(args: Any, made: Any) -> int:
    """Return a pointwise CPU kernel's copies: it works in one type, so tensors of other types are copied."""
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
    """Return the size of the whole weight in the type of the input, and of its scales twice in float32.

    The scales exist before and after their offset. On CUDA bitsandbytes' fused kernel needs no such memory for few
    rows, which a pass over a batch never has.
    """
    given, weights, scales = args[0], prod(args[2]), prod(args[2]) // args[4]
    return weights * given.element_size() + 4 * scales


def _whole(args: Any, made: Any, device: DeviceKind) -> int:
    """Return the size of the argument: `logsumexp` makes exp(x - max), `vecdot` the products."""
    return int(args[0].nbytes)


def _attention_backward(args: Any, made: Any, device: DeviceKind) -> int:
    """Return the memory of CUDA's flash kernel: the queries' gradient in float32, and one number a row."""
    grad_BHLE: Tensor = args[0]
    return 0 if device == "cpu" else 4 * grad_BHLE.numel() + 4 * grad_BHLE.numel() // grad_BHLE.shape[-1]


def _masked_index(args: Any, made: Any, device: DeviceKind) -> int:
    """Return the size of a mask's positions: one int64 for each of its dimensions."""
    masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
    return sum(8 * mask.dim() * made.shape[0] for mask in masks)


def _sorted(args: Any, made: Any, device: DeviceKind) -> int:
    """Return the size of CUDA's second buffer, in which it sorts, and of the int64 positions."""
    return 0 if device == "cpu" else sum(result.nbytes for result in made)


_WORKSPACES: dict[Any, Callable[[Any, Any, DeviceKind], int]] = {
    aten.logsumexp: _whole,
    aten.linalg_vecdot: _whole,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.index: _masked_index,
    aten.sort: _sorted,
}
