"""AdamW for weights and moments kept in few bits: computed in float32, one chunk of a parameter at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from distill.training.optimizers.moments import CodeMaps, flat, moments
from distill.training.optimizers.rounding import Rounding, read_compensated, store, store_compensated

CHUNK = 2**18
"""Values whose float32 form exists at one time; a multiple of every group of `moments`."""


def chunks(count: int) -> Iterator[slice]:
    """Yield the chunks of a flattened parameter of `count` values."""
    for start in range(0, count, CHUNK):
        yield slice(start, min(start + CHUNK, count))


class ChunkedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) whose moments take `moment_bits` (8 or 4; None: the weights' type).

    On float32 weights with moments in full it is `torch.optim.AdamW` to the last bit. `rounding` is how a float32
    result becomes a bfloat16 weight (and moment); `kahan` keeps two more bytes a weight. Other
    optimisers give us their codes alone: torchao's compile a kernel for each shape or take the memory of many float32
    copies of the largest parameter, bitsandbytes' round to the nearest only (on CUDA `FusedAdamW8bit` takes its place
    then), and optimi's weight decay is lost in bfloat16.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float = 0.0,
        *,
        rounding: Rounding = "nearest",
        moment_bits: int | None = None,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps})
        self.rounding, self.moment_bits = rounding, moment_bits
        self.walk: Callable[[int], Iterable[slice]] = chunks
        """Chunks of a parameter in turn; a forecast leaves out those that are like the ones before them."""
        self._maps: CodeMaps = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        first, second = moments(self.moment_bits, parameter, self.rounding, self._maps)
        state = self.state[parameter]
        if not state:
            state |= {"step": 0, "exp_avg": first.zeros(parameter), "exp_avg_sq": second.zeros(parameter)}
            if self.rounding == "kahan" and parameter.dtype == torch.bfloat16:
                state["compensation"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        state["step"] += 1
        assert parameter.grad is not None
        weight, gradient = flat(parameter.detach()), flat(parameter.grad.contiguous())
        compensation = flat(state["compensation"]) if "compensation" in state else None
        for rows in self.walk(len(weight)):
            exp_avg, exp_avg_sq = first.read(state["exp_avg"], rows), second.read(state["exp_avg_sq"], rows)
            if compensation is None:
                values = weight[rows].float()
            else:
                values = read_compensated(weight[rows], compensation[rows])
            _adamw(values, gradient[rows].float(), exp_avg, exp_avg_sq, state["step"], group)
            first.write(state["exp_avg"], rows, exp_avg)
            second.write(state["exp_avg_sq"], rows, exp_avg_sq)
            if compensation is None:
                store(values, weight[rows], self.rounding)
            else:
                store_compensated(values, weight[rows], compensation[rows])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state as any optimiser does, but keep its types: torch would cast codes to the weights' type."""
        super().load_state_dict(state_dict)
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                self.state[parameter] = _copy(state_dict["state"][number], parameter.device)


def _adamw(
    weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, group: dict[str, Any]
) -> None:
    """Make one step in place, all float32: `weight -= lr * (m̂ / (√v̂ + eps) + weight_decay * weight)`."""
    beta1, beta2 = group["betas"]
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    scale = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    weight.addcdiv_(exp_avg, scale, value=-group["lr"] / (1 - beta1**step))


def _copy(state: Any, device: torch.device) -> Any:
    if isinstance(state, dict):
        return {key: _copy(value, device) for key, value in state.items()}
    return state.to(device, copy=True) if isinstance(state, Tensor) else state
