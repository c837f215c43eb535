"""Float32 results kept in bfloat16: rounded to the nearest, at random, or with the remainder beside them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic", "kahan"]
"""Rounding of a float32 result that is kept in a bfloat16 weight."""


def stochastic_round(values: Tensor) -> Tensor:
    """Round float32 `values` to a bfloat16 neighbour, the farther one as rarely as it is far: exact in expectation.

    The draws are from torch's global generator of the device. Values that bfloat16 holds stay, infinities and NaN too.
    """
    bits = values.view(torch.int32)
    # The lower 16 bits are the distance to the neighbour nearer zero, in units of 2^-16 of the gap.
    noise = torch.randint(1 << 16, bits.shape, dtype=torch.int32, device=bits.device)
    # -65536 is 0xFFFF0000. The sum with a NaN's bits may overflow into a number, so NaNs are put back.
    rounded = noise.add_(bits).bitwise_and_(-65536).view(torch.float32)
    return torch.where(values.isnan(), values, rounded).to(torch.bfloat16)


def store(values: Tensor, into: Tensor, rounding: Rounding) -> None:
    """Round float32 `values` into a tensor of any type, at random only into bfloat16: others have enough digits."""
    if rounding == "stochastic" and into.dtype == torch.bfloat16:
        into.copy_(stochastic_round(values))
    else:
        into.copy_(values)


def read_compensated(weight: Tensor, compensation: Tensor) -> Tensor:
    """Return the float32 value of a weight plus its remainder."""
    return weight.float() + compensation.float()


def store_compensated(values: Tensor, weight: Tensor, compensation: Tensor) -> None:
    """Round float32 `values` into `weight`, and the remainder into `compensation`: 16 bits of mantissa in all.

    Kahan's summation carries such a pair along, so no update is lost for being smaller than the last digit.
    """
    weight.copy_(values)
    compensation.copy_(values - weight.float())
