"""Head and loss in one pass: equal to the naive dense program, gradients too, without its `[N, V]` tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from distill.losses.chunks import SparseChunk
from distill.losses.divergences import forward_kl
from distill.losses.fused import fused_loss
from distill.losses.objective import Mixture
from distill.models.language_model import Head

N, V, D = 253, 1009, 13
Loss = Callable[[Tensor, Head, SparseChunk], Tensor]
MakeTarget = Callable[..., SparseChunk]


def make_inputs(dtype: torch.dtype = torch.float64, positions: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head weight and head bias that want gradients."""
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape: int, scale: float) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return values.to(dtype).requires_grad_()

    return leaf(positions, D, scale=1), leaf(V, D, scale=0.8), leaf(V, scale=0.5)


def naive(divergence: Mixture) -> Loss:
    """The program that `fused_loss` equals."""
    return lambda hidden_ND, head, target: divergence(head(hidden_ND), target).sum()


def fused(divergence: Mixture, chunk_size: int) -> Loss:
    return lambda hidden_ND, head, target: fused_loss(hidden_ND, head, target, divergence, chunk_size)


def loss_and_gradients(loss: Loss, inputs: tuple[Tensor, ...], target: SparseChunk, **head: Any) -> list[Tensor]:
    value = loss(inputs[0], Head(*inputs[1:], **head), target)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, wanted)]


def check_equal(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 10**6])
@pytest.mark.parametrize("head", [{}, {"scale": 0.37, "soft_cap": 1.9}], ids=["plain", "scale and cap"])
def test_equals_the_naive_program(make_target: MakeTarget, chunk_size: int, head: dict[str, float]) -> None:
    for alpha in (0, 0.3, 1):
        target, divergence = make_target(N, V), Mixture(alpha)
        expected = loss_and_gradients(naive(divergence), make_inputs(), target, **head)
        assert all(gradient.abs().max() > 1e-3 for gradient in expected[1:])
        check_equal(loss_and_gradients(fused(divergence, chunk_size), make_inputs(), target, **head), expected)


def test_without_a_bias(make_target: MakeTarget) -> None:
    target, inputs = make_target(N, V), make_inputs()[:2]
    expected = loss_and_gradients(naive(Mixture(0.3)), inputs, target)
    check_equal(loss_and_gradients(fused(Mixture(0.3), 64), inputs, target), expected)


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1), (2,)])
def test_frozen_parts_get_no_gradient_and_change_no_other(make_target: MakeTarget, frozen: tuple[int, ...]) -> None:
    target, inputs = make_target(N, V), make_inputs()
    for part in frozen:
        inputs[part].requires_grad_(False)
    expected = loss_and_gradients(naive(Mixture(0.3)), inputs, target)
    check_equal(loss_and_gradients(fused(Mixture(0.3), 64), inputs, target), expected)
    fused(Mixture(0.3), 64)(inputs[0], Head(*inputs[1:]), target).backward()
    assert all((tensor.grad is None) == (part in frozen) for part, tensor in enumerate(inputs))


def test_ignored_positions(make_target: MakeTarget) -> None:
    """A batch of samples of which the mask leaves some positions: the others' gradient is exactly 0."""
    hidden_ND, weight_VD, bias_V = make_inputs()
    mask_N = torch.rand(N, generator=torch.Generator().manual_seed(1)) < 0.6
    target = make_target(int(mask_N.sum()), V)

    def gradients(loss: Loss) -> list[Tensor]:
        value = loss(hidden_ND[mask_N], Head(weight_VD, bias_V), target)
        return [value.detach(), *torch.autograd.grad(value, (hidden_ND, weight_VD, bias_V))]

    found = gradients(fused(Mixture(0.3), 7))
    check_equal(found, gradients(naive(Mixture(0.3))))
    assert not found[1][~mask_N].any()


def test_rows_beyond_the_vocabulary_take_no_part(make_target: MakeTarget) -> None:
    vocab_size = 900
    hidden_ND, weight_VD, bias_V = make_inputs()
    target = make_target(N, vocab_size)

    def gradients() -> list[Tensor]:
        head = Head(weight_VD, bias_V).with_rows(vocab_size)
        value = fused_loss(hidden_ND, head, target, Mixture(0.3), 64)
        return [value.detach(), *torch.autograd.grad(value, (hidden_ND, weight_VD, bias_V))]

    first = gradients()
    assert first[2].shape == (V, D) and not first[2][vocab_size:].any() and not first[3][vocab_size:].any()
    assert first[2][:vocab_size].any(dim=-1).all()
    with torch.no_grad():
        weight_VD[vocab_size:] = 1e30
        bias_V[vocab_size:] = math.inf
    assert all(torch.equal(before, after) for before, after in zip(first, gradients(), strict=True))


def test_no_positions_at_all(make_target: MakeTarget) -> None:
    target, inputs = make_target(N, V)[0:0], make_inputs(positions=0)
    loss, *gradients = loss_and_gradients(fused(Mixture(0.3), 64), inputs, target)
    assert loss == 0 and not any(gradient.any() for gradient in gradients)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in inputs]


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation returns, in elements."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def largest_and_saved(loss: Loss, target: SparseChunk) -> tuple[int, int]:
    """Elements of the largest tensor that exists in forward and backward, and of the largest saved between them."""
    inputs, saved = make_inputs(), [0]

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with Largest() as largest, saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(inputs[0], Head(*inputs[1:], scale=0.5, soft_cap=3.0), target).backward()
    return largest.numbers, max(saved)


def test_the_logits_of_all_positions_never_exist(make_target: MakeTarget) -> None:
    target = make_target(N, V)
    assert largest_and_saved(naive(Mixture(0.3)), target)[0] == N * V, "the measurement sees nothing"
    for chunk_size in (16, 64):
        largest, saved = largest_and_saved(fused(Mixture(0.3), chunk_size), target)
        assert largest <= chunk_size * V
        assert saved <= chunk_size * V


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("divergence", [forward_kl, lambda logits_NV, target: logits_NV.square().mean(-1)])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_validation_computes_no_gradients(
    make_target: MakeTarget, divergence: Any, without: type[torch.no_grad]
) -> None:
    target, (hidden_ND, *head) = make_target(N, V), make_inputs()
    with Products() as with_gradients:
        expected = fused_loss(hidden_ND, Head(*head), target, divergence, 64)
    with without(), Products() as alone:
        assert fused_loss(hidden_ND, Head(*head), target, divergence, 64) == expected
    assert (with_gradients.count, alone.count) == (3 * 4, 4)


def test_a_second_backward_is_refused(make_target: MakeTarget) -> None:
    """The gradients are scaled in place: a second use must not be answered with a wrong number."""
    hidden_ND, *head = make_inputs()
    loss = fused_loss(hidden_ND, Head(*head), make_target(N, V), forward_kl, 64) * 3
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


# Low precision: no further from float64 than the naive low-precision program.


def low_precision(loss: Loss, dtype: torch.dtype, target: SparseChunk, scale: float = 1.0) -> list[Tensor]:
    """Mean loss and its gradients in mixed precision: float32 head, hidden states as the body gives them."""
    hidden_ND, weight_VD, bias_V = make_inputs(torch.float32)
    hidden_ND = hidden_ND.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        value = loss(hidden_ND, Head(weight_VD, bias_V), target) / N
    gradients = torch.autograd.grad(value * scale, (hidden_ND, weight_VD, bias_V))
    return [value.detach().double(), *(gradient.double() / scale for gradient in gradients)]


def truth(dtype: torch.dtype, target: SparseChunk) -> list[Tensor]:
    """The same in float64 of the rounded inputs."""
    hidden_ND, weight_VD, bias_V = (tensor.detach() for tensor in make_inputs(torch.float32))
    inputs = tuple(t.double().requires_grad_() for t in (hidden_ND.to(dtype), weight_VD, bias_V))
    return [tensor / N for tensor in loss_and_gradients(naive(Mixture(0.3)), inputs, target)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_size", [7, 64])
def test_mixed_precision_is_as_exact_as_the_naive_program(
    make_target: MakeTarget, dtype: torch.dtype, chunk_size: int
) -> None:
    target = make_target(N, V, torch.float32)
    reference = truth(dtype, target)
    ours = low_precision(fused(Mixture(0.3), chunk_size), dtype, target)
    theirs = low_precision(naive(Mixture(0.3)), dtype, target)
    for found, naive_found, expected in zip(ours, theirs, reference, strict=True):
        error, naive_error = (found - expected).norm(), (naive_found - expected).norm()
        assert 0 < naive_error < 0.05 * expected.norm()
        assert error <= 1.01 * naive_error


def test_float16_with_a_loss_scale_is_finite_and_exact(make_target: MakeTarget) -> None:
    target = make_target(N, V, torch.float32)
    reference = truth(torch.float16, target)
    found = low_precision(fused(Mixture(0.3), 64), torch.float16, target, scale=65536)
    assert all(tensor.isfinite().all() for tensor in found)
    for ours, expected in zip(found, reference, strict=True):
        assert (ours - expected).norm() <= 2e-3 * expected.norm()


def test_bfloat16_parameters_get_bfloat16_gradients(make_target: MakeTarget) -> None:
    target = make_target(N, V, torch.float32)
    inputs = make_inputs(torch.bfloat16)
    _, *gradients = loss_and_gradients(fused(Mixture(0), 64), inputs, target)
    assert {gradient.dtype for gradient in gradients} == {torch.bfloat16}
