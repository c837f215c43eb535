"""Float32 results kept in bfloat16: rounded to the nearest, at random, or with what was rounded off beside them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic", "kahan"]
"""How a float32 result is kept in a bfloat16 weight."""


def stochastic_round(values: Tensor) -> Tensor:
    """bfloat16 neighbours of float32 `values`, the farther one as rarely as it is far: the expectation is exact.

    Drawn from torch's global generator of the device. What bfloat16 holds stays as it is, infinities and NaN too.
    """
    bits = values.view(torch.int32)
    # The lower 16 bits are the distance to the neighbour nearer zero, in units of 2^-16 of the gap.
    noise = torch.randint(1 << 16, bits.shape, dtype=torch.int32, device=bits.device)
    # -65536 is 0xFFFF0000. Whatever is added to a NaN may run over its bits into a number.
    rounded = noise.add_(bits).bitwise_and_(-65536).view(torch.float32)
    return torch.where(values.isnan(), values, rounded).to(torch.bfloat16)


def store(values: Tensor, into: Tensor, rounding: Rounding) -> None:
    """Round float32 `values` into a tensor of any type; at random only into bfloat16, for others have enough digits."""
    if rounding == "stochastic" and into.dtype == torch.bfloat16:
        into.copy_(stochastic_round(values))
    else:
        into.copy_(values)


def read_compensated(weight: Tensor, compensation: Tensor) -> Tensor:
    """Float32 value of a weight and what was rounded off it."""
    return weight.float() + compensation.float()


def store_compensated(values: Tensor, weight: Tensor, compensation: Tensor) -> None:
    """Round float32 `values` into `weight`, and what that cuts off into `compensation`: 16 bits of mantissa in all.

    The pair is what Kahan's summation carries along, so no update is lost for being smaller than the last digit.
    """
    weight.copy_(values)
    compensation.copy_(values - weight.float())
