"""AdamW's two moments in memory: in the weights' type, in 8 bits (bitsandbytes) or in 4 bits (torchao)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from distill.errors import UserError
from distill.system.quiet import quiet
from distill.training.optimizers.rounding import Rounding, store

Stored = Any
"""One moment of one parameter: a tensor, or the tensors of its codes by name."""

CodeMaps = dict[tuple[type, bool, torch.device], Tensor]
"""Values of the codes, by class and sign, on each device. An optimiser has its own."""

SMALL = 4096
"""Number of values below which a parameter keeps its moments in full: norms and biases are delicate, and small."""


class Moment(Protocol):
    """The way in which a moment is kept. Rows are slices of the flattened parameter that begin with a group."""

    def zeros(self, parameter: Tensor) -> Stored: ...

    def read(self, stored: Stored, rows: slice) -> Tensor:
        """Return float32 values."""
        ...

    def write(self, stored: Stored, rows: slice, values: Tensor) -> None: ...


@dataclass(frozen=True)
class AsWeights:
    """Moments in the type of the weights."""

    rounding: Rounding

    def zeros(self, parameter: Tensor) -> Stored:
        return torch.zeros_like(parameter, memory_format=torch.contiguous_format)

    def read(self, stored: Stored, rows: slice) -> Tensor:
        return flat(stored)[rows].float()

    def write(self, stored: Stored, rows: slice, values: Tensor) -> None:
        # Stochastic rounding here too: rounding to the nearest bfloat16 would drop most of what a beta2 of 0.999 adds
        # to the second moment.
        store(values, flat(stored)[rows], self.rounding)


@dataclass(frozen=True)
class EightBits:
    """Codes of bitsandbytes' dynamic map, and the largest value of each group (Dettmers et al. 2021)."""

    signed: bool
    maps: CodeMaps
    group = 256

    def zeros(self, parameter: Tensor) -> Stored:
        return {
            "codes": torch.zeros(parameter.numel(), dtype=torch.uint8, device=parameter.device),
            "scale": torch.zeros(-(-parameter.numel() // self.group), device=parameter.device),
        }

    def read(self, stored: Stored, rows: slice) -> Tensor:
        codes, scale = stored["codes"][rows], stored["scale"][_groups(rows, self.group)]
        code_map = self._code_map(codes.device)
        return _bitsandbytes().dequantize_blockwise(codes, absmax=scale, code=code_map, blocksize=self.group)

    def write(self, stored: Stored, rows: slice, values: Tensor) -> None:
        code_map = self._code_map(values.device)
        codes, quantized = _bitsandbytes().quantize_blockwise(values, code=code_map, blocksize=self.group)
        stored["codes"][rows] = codes
        stored["scale"][_groups(rows, self.group)] = quantized.absmax

    def _code_map(self, device: torch.device) -> Tensor:
        key = type(self), self.signed, device
        if key not in self.maps:
            self.maps[key] = _bitsandbytes().create_dynamic_map(signed=self.signed).to(device)
        return self.maps[key]


@dataclass(frozen=True)
class FourBits:
    """Moments in torchao's 4-bit states: two codes a byte, and the largest value of each group (Li et al. 2023)."""

    signed: bool
    maps: CodeMaps
    group = 128

    def zeros(self, parameter: Tensor) -> Stored:
        state = _torchao_state().zeros((parameter.numel(),), self.signed, self.group, parameter.device)
        return {"codes": state.codes, "scale": state.scale}

    def read(self, stored: Stored, rows: slice) -> Tensor:
        return self._view(stored, rows).dequantize()

    def write(self, stored: Stored, rows: slice, values: Tensor) -> None:
        self._view(stored, rows).copy_(values)

    def _view(self, stored: Stored, rows: slice) -> Any:
        """Return torchao's own object for these rows, on the same memory."""
        codes, scale = stored["codes"][rows.start // 2 : rows.stop // 2], stored["scale"][_groups(rows, self.group)]
        key = type(self), self.signed, codes.device
        if key not in self.maps:
            self.maps[key] = _torchao_state().zeros((self.group,), self.signed, self.group, codes.device).qmap
        code_map = self.maps[key]
        return _torchao_state()(codes, scale, code_map, self.signed, (2 * codes.numel(),))


def moments(bits: int | None, parameter: Tensor, rounding: Rounding, maps: CodeMaps) -> tuple[Moment, Moment]:
    """Choose how a parameter's two moments are kept: in 8 or 4 bits if its size allows, else in its type."""
    if bits == 8 and parameter.numel() >= SMALL:
        return EightBits(True, maps), EightBits(False, maps)
    if bits == 4 and parameter.numel() >= SMALL and parameter.numel() % FourBits.group == 0:
        return FourBits(True, maps), FourBits(False, maps)
    return AsWeights(rounding), AsWeights(rounding)


def flat(tensor: Tensor) -> Tensor:
    """Return the same memory with one dimension; of a sharded tensor this device's share."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.view(-1)


def need_torchao() -> None:
    """Raise UserError when torchao is missing."""
    _torchao_state()


def _groups(rows: slice, group: int) -> slice:
    return slice(rows.start // group, -(-rows.stop // group))


@functools.cache
def _bitsandbytes() -> Any:
    with quiet():
        from bitsandbytes import functional
    return functional


@functools.cache
def _torchao_state() -> Any:
    try:
        with quiet():
            from torchao.optim.subclass_4bit import OptimState4bit
    except ImportError:
        raise UserError(
            "train.optimizer: adamw_4bit needs torchao: pip install 'distill-small-card[low-bit]'"
        ) from None
    return OptimState4bit
