"""Activations that wait on the host: the same gradients, the weights left where they are."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.training import offload
from distill.training.activation_checkpointing import checkpoint_blocks
from distill.training.offload import check_offload, saved_on_host


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"blocks": nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)])})


def gradients(model: Any, context: AbstractContextManager[Any]) -> list[Tensor]:
    hidden = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    with context:
        for block in model["blocks"]:
            hidden = hidden + block(hidden)
    hidden.square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the tensors that are made on the host."""
    shapes: list[torch.Size] = []
    empty = torch.empty

    def counted(shape: torch.Size, **options: Any) -> Tensor:
        if "pin_memory" in options:
            shapes.append(shape)
        return empty(shape, **options)

    monkeypatch.setattr(offload.torch, "empty", counted)
    return shapes


@pytest.mark.parametrize("recomputed", [0, 1, 2])
def test_gradients_are_the_same_and_weights_stay(recomputed: int, copied: list[torch.Size]) -> None:
    plain, offloaded = model(), model()
    if recomputed:
        checkpoint_blocks(offloaded, recomputed)
    expected = gradients(plain, nullcontext())
    found = gradients(offloaded, saved_on_host(offloaded, large=0, pin_memory=False))
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    # A plain block saves the inputs of its layer and of GELU; a recomputed one its own input.
    assert copied.count(torch.Size([5, 8])) == {0: 6, 1: 3, 2: 4}[recomputed]
    assert torch.Size([8, 8]) not in copied


def test_small_tensors_stay(copied: list[torch.Size]) -> None:
    one = model()
    gradients(one, saved_on_host(one, large=5 * 8 * 4 + 1, pin_memory=False))
    assert copied == []


def test_what_is_not_contiguous_comes_back_as_it_was() -> None:
    def gradient(context: AbstractContextManager[Any]) -> Tensor:
        matrix = torch.arange(12.0).reshape(3, 4).requires_grad_(True)
        other = torch.arange(12.0, 24.0).reshape(4, 3).T
        with context:
            product = matrix.exp().T.sin().T * other
        product.sum().backward()
        assert matrix.grad is not None
        return matrix.grad

    context = saved_on_host(nn.Identity(), large=0, pin_memory=False)
    assert torch.equal(gradient(context), gradient(nullcontext()))


def test_a_changed_weight_is_noticed() -> None:
    """Weights are not copied, and torch does not see behind these hooks that one has been changed since."""
    layers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with saved_on_host(layers, large=0, pin_memory=False):
        loss = layers(torch.ones(1, 3)).sum()
    with torch.no_grad():
        layers[1].weight.add_(1)
    with pytest.raises(AssertionError, match="changed since"):
        loss.backward()


@pytest.mark.parametrize("device_type", ["cpu", "mps"])
def test_without_a_card_it_is_refused(device_type: str) -> None:
    check_offload("cuda")
    with pytest.raises(UserError, match=f"train.offload_activations.*CUDA.*{device_type}"):
        check_offload(device_type)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here")
def test_on_a_card_memory_is_freed() -> None:
    layers = nn.Sequential(*[nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(8)]).cuda()
    hidden = torch.randn(8192, 1024, device="cuda")
    found: list[tuple[int, list[Tensor]]] = []
    for context in (nullcontext(), offload.offload_activations(layers)):
        torch.cuda.reset_peak_memory_stats()
        with context:
            loss = layers(hidden).square().mean()
        loss.backward()
        found.append((torch.cuda.max_memory_allocated(), [p.grad for p in layers.parameters()]))  # type: ignore[misc]
        layers.zero_grad()
    assert found[1][0] < 0.6 * found[0][0]
    assert all(torch.equal(*pair) for pair in zip(found[0][1], found[1][1], strict=True))
