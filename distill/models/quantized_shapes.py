"""Quantised layers without memory, on fake weights as bitsandbytes' quantisation would leave them.

bitsandbytes makes its weights classes of their own, which fake tensors cannot become.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

BLOCK, OUTER_BLOCK = 64, 256
"""Weights that share a scale, and scales that share theirs (double quantisation)."""


def packed_linear(weight_OI: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> nn.Module:
    """Make a `bitsandbytes.nn.Linear4bit` as after quantisation to NF4 with compressed statistics."""
    from bitsandbytes.functional import QuantState

    rows, columns = weight_OI.shape
    count, device = weight_OI.numel(), weight_OI.device
    layer: Any = _packed_class().__new__(_packed_class())
    nn.Module.__init__(layer)
    layer.in_features, layer.out_features, layer.bias = columns, rows, bias
    scales = -(-count // BLOCK)
    outer = QuantState(
        absmax=torch.empty(-(-scales // OUTER_BLOCK), device=device),
        code=torch.empty(256, device=device),
        blocksize=OUTER_BLOCK,
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=torch.empty(scales, dtype=torch.uint8, device=device),
        shape=torch.Size((rows, columns)),
        code=torch.empty(16, device=device),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty((), device=device),
        state2=outer,
    )
    packed = nn.Parameter(torch.empty(-(-count // 2), 1, dtype=torch.uint8, device=device), requires_grad=False)
    for name, value in {"quant_state": state, "compress_statistics": True, "quant_type": "nf4"}.items():
        setattr(packed, name, value)
    layer.weight = packed
    layer.compute_dtype, layer.compute_type_is_set = dtype, True
    layer.quant_state, layer.quant_storage, layer.support_avx512bf16_for_cpu = None, torch.uint8, False
    return layer


@functools.cache
def _packed_class() -> Any:
    import bitsandbytes as bnb

    class PackedLinear(bnb.nn.Linear4bit):
        """4-bit layer that no cast or move reaches: fake parameters are swapped for new ones, without their scales."""

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            return self

    return PackedLinear


class ScaledLinear(nn.Module):
    """Stand-in for a quantised `bitsandbytes.nn.Linear8bitLt`: codes, and a scale a row. No cast or move reaches it."""

    def __init__(self, weight_OI: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(weight_OI, dtype=torch.int8), requires_grad=False)
        self.weight.SCB = torch.empty(len(weight_OI), device=weight_OI.device)  # type: ignore[attr-defined]
        self.bias = bias

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return self

    def forward(self, hidden: Tensor) -> Tensor:
        """Multiply whole numbers without outliers, and scale: it takes as many bytes as bitsandbytes does."""
        codes_NI = hidden.reshape(-1, hidden.shape[-1]).to(torch.float16).to(torch.int8)
        product_NO = torch._int_mm(codes_NI, self.weight.T)
        result_NO = (product_NO * self.weight.SCB).to(hidden.dtype)  # type: ignore[attr-defined]
        if self.bias is not None:
            result_NO += self.bias
        return result_NO.view(*hidden.shape[:-1], -1)
