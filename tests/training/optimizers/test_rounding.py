"""Rounding to bfloat16: at random without bias, and with a compensation that keeps every small step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.training.optimizers.rounding import read_compensated, stochastic_round, store_compensated


def neighbours(values: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 numbers around float32 values: towards zero, and away from it."""
    bits = values.view(torch.int32)
    return (bits & -65536).view(torch.float32), ((bits & -65536) + 65536).view(torch.float32)


def test_it_is_one_of_the_two_neighbours_and_right_on_average() -> None:
    torch.manual_seed(0)
    values = torch.randn(40) * 10.0 ** torch.arange(-20, 20)
    inner, outer = neighbours(values)
    drawn = stochastic_round(values.expand(20_000, -1).contiguous()).float()
    assert ((drawn == inner) | (drawn == outer)).all()
    gap = (outer - inner).abs().double()
    error = (drawn.double().mean(0) - values.double()) / gap
    # Six standard errors of a coin; rounding to the nearest would be off by a fourth of the gap on average.
    assert error.abs().max() < 6 * 0.5 / 20_000**0.5


def test_what_bfloat16_holds_stays() -> None:
    held = torch.tensor([0.0, -0.0, 1.0, -3.5, torch.inf, -torch.inf, 2.0**-126]).expand(500, -1).contiguous()
    assert torch.equal(stochastic_round(held).float().view(torch.int32), held.view(torch.int32))


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, -4194304])  # -1: 0xFFFFFFFF, then a CPU's own
def test_no_nan_becomes_a_number(bits: int) -> None:
    """0x7FFFFFFF is the NaN that CUDA makes: noise added to it runs over into minus zero."""
    assert stochastic_round(torch.full((500,), bits, dtype=torch.int32).view(torch.float32)).isnan().all()


def test_draws_come_from_the_global_generator() -> None:
    values = torch.rand(1000)
    torch.manual_seed(3)
    first, other = stochastic_round(values), stochastic_round(values)
    torch.manual_seed(3)
    assert torch.equal(stochastic_round(values), first) and not torch.equal(other, first)


def test_a_compensated_weight_has_sixteen_bits() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    weight, compensation = torch.empty(2, 10_000, dtype=torch.bfloat16)
    store_compensated(values, weight, compensation)
    assert torch.equal(weight, values.to(torch.bfloat16))
    error = ((read_compensated(weight, compensation) - values) / values).abs().max()
    assert 2**-19 < error <= 2**-17
