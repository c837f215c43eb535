"""Formats of packed weights: NF4 with double quantisation and int8, as arrays of plain tensors beside one another.

Shapes: S slices of a weight, each quantised on its own; O rows, I columns of a slice.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from distill.models.quantized_shapes import BLOCK, OUTER_BLOCK

Parts = dict[str, Tensor]


class Format(Protocol):
    """A way to keep a weight in few bits. A slice's parts are rows of the weight's."""

    name: str

    def layout(self, shape: torch.Size) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and type of each part of a slice of `shape`; the first is that of the codes."""

    def pack(self, weight: Tensor) -> Parts:
        """Quantise one slice."""

    def unpack(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return one slice in full."""


def dequantize(codes: Tensor, state: Any) -> Tensor:
    """Return the weight of four-bit codes and their `QuantState`, in one row for bitsandbytes.

    Its kernel for processors takes the wrong scales where a row is no whole number of blocks (0.50.2).
    """
    from bitsandbytes.functional import dequantize_4bit

    flat = copy.copy(state)
    flat.shape = torch.Size((prod(state.shape),))
    return dequantize_4bit(codes.view(-1, 1), flat).view(state.shape)


class NF4:
    """Four bits a weight, blocks of 64 with a scale, scales in eight bits: bitsandbytes' codes for `Linear4bit`."""

    name = "nf4"

    def layout(self, shape: torch.Size) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        count = prod(shape)
        scales = -(-count // BLOCK)
        return {
            "codes": ((-(-count // 2),), torch.uint8),
            "scales": ((scales,), torch.uint8),
            "outer_scales": ((-(-scales // OUTER_BLOCK),), torch.float32),
            "offset": ((), torch.float32),
        }

    def pack(self, weight: Tensor) -> Parts:
        import bitsandbytes.functional as F

        codes, state = F.quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
        return {
            "codes": codes.flatten(),
            "scales": state.absmax,
            "outer_scales": state.state2.absmax,
            "offset": state.offset,
        }

    def unpack(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import QuantState

        device = parts["codes"].device
        outer = QuantState(
            absmax=parts["outer_scales"], code=_scale_codes(device), blocksize=OUTER_BLOCK, dtype=torch.float32
        )
        state = QuantState(
            absmax=parts["scales"],
            shape=shape,
            dtype=dtype,
            blocksize=BLOCK,
            quant_type="nf4",
            offset=parts["offset"],
            state2=outer,
        )
        return dequantize(parts["codes"], state)


class Int8:
    """Eight bits a weight and a scale a row: bitsandbytes' codes for `Linear8bitLt`."""

    name = "int8"

    def layout(self, shape: torch.Size) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, columns = prod(shape[:-1]), shape[-1]
        return {"codes": ((rows, columns), torch.int8), "scales": ((rows,), torch.float32)}

    def pack(self, weight: Tensor) -> Parts:
        import bitsandbytes.functional as F

        codes, scales, _ = F.int8_vectorwise_quant(weight.reshape(-1, weight.shape[-1]).contiguous().half())
        return {"codes": codes, "scales": scales.float()}

    def unpack(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(parts["codes"], parts["scales"]).to(dtype).view(shape)


FORMATS: dict[str, Format] = {"nf4": NF4(), "int8": Int8()}
_SCALE_CODES: dict[torch.device, Tensor] = {}


def _scale_codes(device: torch.device) -> Tensor:
    """Return the 256 values of a scale in eight bits."""
    from bitsandbytes.functional import create_dynamic_map
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    if device not in _SCALE_CODES:
        with unset_fake_temporarily(), torch.device("cpu"):
            _SCALE_CODES[device] = create_dynamic_map().to(device)
    return _SCALE_CODES[device]


def int8_linear(hidden: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """Multiply as `Linear8bitLt` does: in whole numbers, but for columns of `hidden` with values above 6."""
    import bitsandbytes as bnb

    state: Any = bnb.MatmulLtState()
    state.CB, state.SCB, state.threshold = parts["codes"], parts["scales"], 6.0
    state.has_fp16_weights, state.is_training, state.use_pool = False, False, True
    rows = hidden.reshape(-1, hidden.shape[-1])  # bitsandbytes takes 2 or 3 dimensions (0.50.2)
    made = bnb.matmul(rows, parts["codes"], bias=bias, state=state)
    return made.view(*hidden.shape[:-1], made.shape[-1])
