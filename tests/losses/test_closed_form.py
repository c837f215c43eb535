"""Forward KL, cross-entropy and their mixture in closed form: no further from float64 than plain PyTorch, whatever the
temperature, the head and the type; other divergences go the general way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.losses import fused as fused_module
from distill.losses.chunks import DenseChunk, SparseChunk
from distill.losses.divergences import cross_entropy, forward_kl, jsd, reverse_kl
from distill.losses.fused import Walk, fused_loss
from distill.losses.objective import Mixture
from distill.losses.surprisal import surprisals
from distill.models.language_model import Head

N, V, D = 61, 499, 24
HEADS = {"plain": {}, "scale": {"scale": 0.37}, "cap": {"scale": 1.3, "soft_cap": 2.1}}
MakeTarget = Callable[..., SparseChunk]


def make_inputs(dtype: torch.dtype, bias: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((N, D), (V, D), (V,))[: 2 + bias]
    return [
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    ]


def gradients(
    loss: Callable[..., Tensor], inputs: list[Tensor], target: SparseChunk, head: dict[str, Any]
) -> list[Any]:
    value = loss(inputs[0], Head(*inputs[1:], **head), target)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def plain(objective: Any) -> Callable[..., Tensor]:
    return lambda hidden_ND, head, target: objective(head(hidden_ND).float(), target).sum()


def ours(objective: Any, chunk_size: int = 17) -> Callable[..., Tensor]:
    walk = Walk(5 * V)  # blocks and scratch both leave a rest
    return lambda hidden_ND, head, target: fused_loss(hidden_ND, head, target, objective, chunk_size, walk)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_equals_autograd(make_target: MakeTarget, head: str, temperature: float, alpha: float) -> None:
    objective, target = Mixture(alpha, temperature), make_target(N, V)
    assert surprisals(objective, target) is not None
    expected = gradients(lambda h, w, t: objective(w(h), t).sum(), make_inputs(torch.float64), target, HEADS[head])
    found = gradients(ours(objective), make_inputs(torch.float64), target, HEADS[head])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_no_larger_than_plain_pytorchs(
    make_target: MakeTarget, head: str, temperature: float, dtype: torch.dtype
) -> None:
    """Positions come in one block, as plain PyTorch takes them; the scratch has a few rows."""
    objective, target = Mixture(0.3, temperature), make_target(N, V, torch.float32)
    inputs = make_inputs(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    truth = gradients(lambda h, w, t: objective(w(h), t).sum(), exact, target, HEADS[head])
    sides = [
        [tensor.double() for tensor in gradients(loss(objective), inputs, target, HEADS[head])]
        for loss in (partial(ours, chunk_size=N), plain)
    ]
    for found, theirs, expected in zip(*sides, truth, strict=True):
        size = expected.norm()
        error, plain_error = (found - expected).norm() / size, (theirs - expected).norm() / size
        assert plain_error < 0.05
        # Both round the same logits, and at this size chance decides who is luckier by a few per cent; in the loss,
        # a single number, by as much as a hundredth of a rounding.
        slack = max(torch.finfo(torch.float32).eps, 0.01 * torch.finfo(dtype).eps)
        assert error <= 1.15 * plain_error + slack


def test_sure_and_wrong_students_have_finite_losses(make_target: MakeTarget) -> None:
    """The target's tokens have probabilities that float32 cannot hold."""
    hidden_ND, weight_VD = make_inputs(torch.float32, bias=False)
    target = make_target(N, V, torch.float32)
    with torch.no_grad():
        weight_VD *= 100
    found = gradients(ours(Mixture(0.3)), [hidden_ND, weight_VD], target, {})
    expected = gradients(plain(Mixture(0.3)), [hidden_ND, weight_VD], target, {})
    assert found[0] > 100 * N
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all() and (one - other).norm() <= 1e-5 * other.norm()


def test_weights_of_less_than_one(make_target: MakeTarget) -> None:
    """Tokens that the student lacks are out: the gradient is `m softmax − w`."""
    target = make_target(N, V)
    less = SparseChunk(target.ids_NK, 0.6 * target.weights_NK, target.entropy_N, target.true_ids_N)
    expected = gradients(lambda h, w, t: forward_kl(w(h), t).sum(), make_inputs(torch.float64), less, {})
    for one, other in zip(gradients(ours(forward_kl), make_inputs(torch.float64), less, {}), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_an_id_that_stands_twice(make_target: MakeTarget) -> None:
    target = make_target(N, V)
    twice = SparseChunk(
        torch.cat([target.ids_NK, target.ids_NK], 1),
        torch.cat([0.25 * target.weights_NK, 0.75 * target.weights_NK], 1),
        target.entropy_N,
        target.ids_NK[:, 0],  # and the text's token a third time
    )
    once = SparseChunk(target.ids_NK, target.weights_NK, target.entropy_N, target.ids_NK[:, 0])
    sides = [gradients(ours(Mixture(0.3)), make_inputs(torch.float64), chunk, {}) for chunk in (once, twice)]
    for one, other in zip(*sides, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_only_what_has_a_closed_form_takes_it(make_target: MakeTarget) -> None:
    sparse = make_target(N, V)
    with_rest = SparseChunk(
        sparse.ids_NK, 0.9 * sparse.weights_NK, sparse.entropy_N, sparse.true_ids_N, sparse.entropy_N
    )
    exact = DenseChunk(torch.randn(N, D), Head(torch.randn(V, D)), sparse.true_ids_N)
    for target in (sparse, with_rest, exact):
        assert surprisals(cross_entropy, target) is not None and surprisals(Mixture(1), target) is not None
        assert surprisals(reverse_kl, target) is None and surprisals(Mixture(0.3, 1, jsd), target) is None
    for target in (with_rest, exact):
        assert surprisals(forward_kl, target) is None and surprisals(Mixture(0.3), target) is None


def test_the_size_of_the_scratch_changes_nothing_but_memory(make_target: MakeTarget) -> None:
    target, inputs = make_target(N, V, torch.float32), make_inputs(torch.bfloat16)
    head = Head(*inputs[1:])
    for objective in (Mixture(0.3), Mixture(0.3, 2.5), lambda logits_NV, chunk: logits_NV.square().mean(-1)):
        first, *others = (
            torch.autograd.grad(fused_loss(inputs[0], head, target, objective, 32, Walk(rows * V)), inputs[:2])
            for rows in (1, 7, 1000)
        )
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_exact_targets_read_the_teachers_head_once_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = DenseChunk.with_logits
    monkeypatch.setattr(DenseChunk, "with_logits", lambda self: (calls.append(len(self.hidden_ND)), original(self))[1])
    hidden_ND, weight_VD = make_inputs(torch.float64, bias=False)
    exact = DenseChunk(torch.randn(N, D), Head(torch.randn(V, D)), torch.zeros(N, dtype=torch.int64), 2.0)
    inputs = [hidden_ND, weight_VD]

    def naive(objective: Mixture) -> Callable[..., Tensor]:
        return lambda hidden_ND, head, target: objective(head(hidden_ND), target).sum()

    for objective in (Mixture(0.3, 2.0), Mixture(0.3, 2.0, reverse_kl)):
        calls.clear()
        found = gradients(ours(objective, 20), inputs, exact, {})
        assert calls == [20, 20, 20, 1]
        for one, other in zip(found, gradients(naive(objective), inputs, exact, {}), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_head_without_padded_rows_gets_its_gradient_uncopied(make_target: MakeTarget) -> None:
    """The sum of its gradient is the only tensor as large as the head that is made: it becomes `grad` itself."""
    hidden_ND, weight_VD = make_inputs(torch.float32, bias=False)
    head = Head(weight_VD)
    assert head.with_rows(V) is head
    made: list[int] = []
    original = fused_module._Gradients.add_products

    def watched(self: Any, *arguments: Any) -> None:
        made.append(self.weight_VD.data_ptr())
        original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_module._Gradients, "add_products", watched)
        fused_loss(hidden_ND, head.with_rows(V), make_target(N, V, torch.float32), Mixture(), 32).backward()
    assert weight_VD.grad is not None and set(made) == {weight_VD.grad.data_ptr()}
