"""Weights kept in few bits in the place of a module's plain parameter, and dequantised when the module uses them.

Shapes: S slices of a weight; N tokens, K experts a token, D hidden size.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.models.packed_formats import FORMATS, Parts, int8_linear
from distill.models.shapes import finder


class PackedWeight(nn.Module):
    """A weight in few bits, in whose place a module's own code finds the full weight.

    Its slices along the first axis, such as experts, are quantised apart, and `weight[index]` dequantises one of them.
    Any other use dequantises all, for as long as the result lives. No cast reaches the weight.
    """

    def __init__(
        self, shape: torch.Size, dtype: torch.dtype, quantization: str, slices: int | None, device: Any = None
    ) -> None:
        """Make a weight of `shape` without values, which gives full weights of `dtype`.

        `slices`: number of slices, which is the first size. None means one that is the weight.
        """
        super().__init__()
        assert slices in (None, shape[0]), "slices lie along the first axis"
        self._shape, self._dtype, self._slices = torch.Size(shape), dtype, slices
        self.format = FORMATS[quantization]
        self._names = list(self.format.layout(self._slice_shape))
        for name, (size, kind) in self.format.layout(self._slice_shape).items():
            part = torch.empty((slices or 1, *size), dtype=kind, device=device)
            if name == "codes":
                self.codes = nn.Parameter(part, requires_grad=False)
            else:
                self.register_buffer(name, part)

    @property
    def shape(self) -> torch.Size:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        """The type of the full weight."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def _slice_shape(self) -> torch.Size:
        return self._shape if self._slices is None else self._shape[1:]

    @torch.no_grad()
    def fill(self, weight: Tensor, index: int | None = None) -> None:
        """Quantise one slice, or all of the weight slice by slice."""
        if index is None and self._slices is not None:
            for number in range(self._slices):
                self.fill(weight[number], number)
            return
        made = self.format.pack(weight.to(self.device, self._dtype))
        for name, part in made.items():
            getattr(self, name)[index or 0].copy_(part)

    def parts(self, index: int = 0) -> Parts:
        """Return the parts of one slice."""
        return {name: getattr(self, name)[index] for name in self._names}

    def slice(self, index: int) -> Tensor:
        """Return one slice in full."""
        return self.format.unpack(self.parts(index), self._slice_shape, self._dtype)

    def whole(self) -> Tensor:
        """Return the full weight."""
        if self._slices is None:
            return self.slice(0)
        return torch.stack([self.slice(index) for index in range(self._slices)])

    def __getitem__(self, index: Any) -> Tensor:
        is_number = isinstance(index, int) or (
            isinstance(index, Tensor) and index.dim() == 0 and not index.dtype.is_floating_point
        )
        if is_number and self._slices is not None:
            return self.slice(int(index))
        return self.whole()[index]

    def __getattr__(self, name: str) -> Any:
        """Answer for the full weight: its methods and properties."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
            return getattr(self.whole(), name)

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.whole() @ other

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return other @ self.whole()

    def __len__(self) -> int:
        return self._shape[0]

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch with the full weight in this one's place."""
        kwargs = kwargs or {}
        if func is F.linear and isinstance(args[1], PackedWeight):
            return args[1].linear(args[0], *args[2:], **kwargs)
        if func is torch.bmm and isinstance(args[1], PackedWeight) and args[1]._slices is not None:
            return torch.stack([given @ args[1].slice(index) for index, given in enumerate(args[0])])
        return func(*(_full(value) for value in args), **{name: _full(value) for name, value in kwargs.items()})

    def linear(self, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply as bitsandbytes' own layer does: in the weight's type, with a result in the type of `hidden`."""
        given = hidden.to(self._dtype)
        if bias is not None:
            bias = bias.to(self._dtype)
        if self.format.name == "int8" and finder() is None:
            return int8_linear(hidden, self.parts(), bias if bias is None else bias.to(hidden.dtype))
        return F.linear(given, self.whole(), bias).to(hidden.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move, but keep every type."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        return f"{tuple(self._shape)}, {self.format.name}"


def _full(value: Any) -> Any:
    if isinstance(value, PackedWeight):
        return value.whole()
    return type(value)(_full(each) for each in value) if type(value) in (list, tuple) else value


def put(module: nn.Module, name: str, weight: PackedWeight) -> None:
    """Put a packed weight in the place of a module's parameter."""
    del module._parameters[name]
    setattr(module, name, weight)


def run_expert_by_expert(experts: nn.Module) -> None:
    """Let fused experts whose class follows transformers' interface for them dequantise one expert at a time.

    The others run their own forward, most of which ask for one expert at a time too. The walk over experts and their
    numbers of tokens goes through `each_expert`, which a forecast replaces.
    """
    if hasattr(experts, "is_transposed") and hasattr(experts, "_apply_gate") and hasattr(experts, "down_proj"):
        own: Any = experts
        own.forward, own.each_expert = types.MethodType(_forward, experts), iter


def _forward(experts: Any, hidden_ND: Tensor, chosen_NK: Tensor, weight_NK: Tensor) -> Tensor:
    """Return the weighted sum `[N, D]` of each token's experts, added up in float32 in the experts' order."""
    slots = chosen_NK.shape[-1]
    up, down = experts.gate_up_proj if experts.has_gate else experts.up_proj, experts.down_proj
    up_name = "gate_up_proj_bias" if experts.has_gate else "up_proj_bias"
    up_bias, down_bias = (getattr(experts, name) if experts.has_bias else None for name in (up_name, "down_proj_bias"))
    # Each slot's expert, in order. A number beyond the last expert stands for none.
    order = chosen_NK.reshape(-1).argsort(stable=True)
    result_ND = torch.zeros(hidden_ND.shape, dtype=torch.float32, device=hidden_ND.device)
    begin = 0
    for index, count in experts.each_expert(enumerate(_counts(chosen_NK, len(down)))):
        if not count:
            continue
        places = order[begin : begin + count]
        begin += count
        tokens = places // slots
        given = _times(experts, hidden_ND[tokens], up[index], up_bias, index)
        given = experts._apply_gate(given) if experts.has_gate else experts.act_fn(given)
        given = _times(experts, given, down[index], down_bias, index)
        if experts.has_post_expert_norm:
            given = experts.post_expert_norm(given)
        # A token has an expert once, so no two rows are added to the same place at a time.
        result_ND.index_add_(0, tokens, (given * weight_NK.reshape(-1)[places, None]).float())
    return result_ND.to(hidden_ND.dtype)


def _times(experts: Any, given: Tensor, weight: Tensor, bias: Tensor | None, index: int) -> Tensor:
    made = F.linear(given.to(weight.dtype), weight.T if experts.is_transposed else weight)
    return made if bias is None else made + bias[index]


def _counts(chosen_NK: Tensor, experts: int) -> list[int]:
    """Return each expert's number of tokens; without values, the tokens spread evenly."""
    if finder() is not None:
        slots = chosen_NK.numel()
        return [slots * (index + 1) // experts - slots * index // experts for index in range(experts)]
    return torch.bincount(chosen_NK.reshape(-1), minlength=experts)[:experts].tolist()
