"""bitsandbytes' fused 8-bit AdamW: the steps of our own, and one kind of checkpoint for both."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from distill.training.optimizers.chunked_adamw import ChunkedAdamW
from distill.training.optimizers.fused import FusedAdamW8bit

pytestmark = pytest.mark.usefixtures("one_thread")

# A group has 256 values: 80 * 103 = 8240 does not fill the last one. The last two keep their moments in full.
SHAPES = [(80, 103), (64, 96), (50, 7), (9,)]
Make = Callable[[nn.Module], torch.optim.Optimizer]


class Weights(nn.Module):
    """Matrices and a vector of normal values."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(shape, generator=generator) * 0.1 for shape in SHAPES]
        self.all = nn.ParameterList([nn.Parameter(values.to(dtype)) for values in made])


def fused(weights: nn.Module) -> torch.optim.Optimizer:
    return FusedAdamW8bit([{"params": [*weights.parameters()], "weight_decay": 0.1}], lr=1e-2, betas=(0.9, 0.95))


def chunked(weights: nn.Module) -> torch.optim.Optimizer:
    groups = [{"params": [*weights.parameters()], "weight_decay": 0.1}]
    return ChunkedAdamW(groups, lr=1e-2, betas=(0.9, 0.95), moment_bits=8)


def train(weights: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in weights.parameters():
            gradient = torch.randn(parameter.shape, generator=generator) + 1
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def resumed(weights: nn.Module, optimizer: torch.optim.Optimizer, make: Make, dtype: torch.dtype) -> Any:
    """The same training in another process: a copy of the weights, and what `make` makes of the saved state."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copy = Weights(dtype)
    copy.load_state_dict(weights.state_dict())
    other = make(copy)
    other.load_state_dict(torch.load(file, weights_only=True))
    return copy, other


def gap(found: nn.Module, expected: nn.Module, begun: nn.Module) -> float:
    """The largest relative difference of how far the weights have come."""
    triples = zip(found.parameters(), expected.parameters(), begun.parameters(), strict=True)
    return max(((a - b).norm() / (b - c).norm()).item() for a, b, c in triples)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_makes_the_steps_of_ours(dtype: torch.dtype) -> None:
    """Up to the order of decay and step, and to moments on the edge between two codes."""
    ours, theirs, begun = Weights(dtype), Weights(dtype), Weights(dtype)
    train(ours, chunked(ours), range(20))
    train(theirs, fused(theirs), range(20))
    assert gap(theirs, ours, begun) < (0.01 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_checkpoint_continues_bitwise(dtype: torch.dtype) -> None:
    first = Weights(dtype)
    begun = fused(first)
    train(first, begun, range(3))
    second, continued = resumed(first, begun, fused, dtype)
    train(first, begun, range(3, 6))
    train(second, continued, range(3, 6))
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("begin", "end"), [(chunked, fused), (fused, chunked)])
def test_each_resumes_what_the_other_began(begin: Make, end: Make, dtype: torch.dtype) -> None:
    undisturbed, first, start = Weights(dtype), Weights(dtype), Weights(dtype)
    begun, other = begin(undisturbed), begin(first)
    train(undisturbed, begun, range(8))
    train(first, other, range(4))
    second, continued = resumed(first, other, end, dtype)
    train(second, continued, range(4, 8))
    assert gap(second, undisturbed, start) < (0.01 if dtype == torch.float32 else 0.03)
    saved, again = other.state_dict()["state"], end(Weights(dtype))
    again.load_state_dict(other.state_dict())
    for number, state in again.state_dict()["state"].items():  # nothing is lost on the way
        assert state["step"] == saved[number]["step"]
        for name in ("exp_avg", "exp_avg_sq"):
            ours, theirs = state[name], saved[number][name]
            pairs = [(ours[key], theirs[key]) for key in ours] if isinstance(ours, dict) else [(ours, theirs)]
            assert all(torch.equal(one.float(), another.float()) for one, another in pairs)
