"""On a CUDA device `adamw_8bit` is bitsandbytes' fused one: the steps of ours, resumed from a CPU's checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distill.training.optimizers.adamw import make_optimizer
from distill.training.optimizers.chunked_adamw import ChunkedAdamW
from distill.training.optimizers.fused import FusedAdamW8bit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here"),
]


def make(module: nn.Module, rounding: Any = "nearest") -> torch.optim.Optimizer:
    given: dict[str, Any] = {"learning_rate": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "rounding": rounding}
    return make_optimizer(module, name="adamw_8bit", **given)


def layers(device: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(103, 80), nn.Linear(80, 64)).to(dtype).to(device)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in module.parameters():
            gradient = torch.randn(parameter.shape, generator=generator) + 1
            parameter.grad = gradient.to(parameter.device, parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_steps_are_ours(dtype: torch.dtype) -> None:
    """Ours on the same device, the fused one, and the fused one resumed from four steps of ours on a CPU."""
    begun, ours, theirs, host = (layers(device, dtype) for device in ("cpu", "cuda", "cuda", "cpu"))
    train(ours, ChunkedAdamW([{"params": [*ours.parameters()]}], 1e-2, (0.9, 0.95), 0.1, moment_bits=8), range(20))
    optimizer = make(theirs)
    assert isinstance(optimizer, FusedAdamW8bit)
    train(theirs, optimizer, range(20))
    on_host = make(host)
    assert isinstance(on_host, ChunkedAdamW)
    train(host, on_host, range(4))
    resumed = layers("cuda", dtype)
    resumed.load_state_dict(host.state_dict())
    again = make(resumed)
    again.load_state_dict(on_host.state_dict())
    train(resumed, again, range(4, 20))
    for start, expected, *found in zip(*(m.parameters() for m in (begun, ours, theirs, resumed)), strict=True):
        way = (expected.cpu() - start).float().norm()
        for parameter in found:
            # Vectors decay in the first of the three alone, by 0.1 * 0.01 a step.
            assert (parameter - expected).float().norm().cpu() < 0.05 * way


def test_other_ways_of_rounding_are_ours() -> None:
    module = layers("cuda", torch.bfloat16)
    assert all(isinstance(make(module, rounding), ChunkedAdamW) for rounding in ("stochastic", "kahan"))
