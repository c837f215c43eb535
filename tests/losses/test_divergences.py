"""The forward KL of every kind of target: the definition's values and gradients, the right mean over samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distill.losses.chunks import DenseChunk, SparseChunk
from distill.losses.divergences import cross_entropy, forward_kl
from distill.models.language_model import Head
from distill.targets.top_k import top_k
from distill.targets.varopt import varopt

N, V = 253, 1009


def random_logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """From open to sure, far from zero mean."""
    generator = torch.Generator().manual_seed(seed)
    sharpness_N1 = torch.linspace(0.1, 6, N, dtype=torch.float64)[:, None]
    return (torch.randn(N, V, generator=generator, dtype=torch.float64) * sharpness_N1 + 7).to(dtype)


def naive_kl(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    p = teacher_NV.log_softmax(-1)
    return (p.exp() * (p - student_NV.log_softmax(-1))).sum(-1)


def whole(teacher_NV: Tensor) -> SparseChunk:
    """A target with an entry for every token."""
    probs_NV = teacher_NV.softmax(-1)
    ids_NV = torch.arange(V).repeat(N, 1)
    return SparseChunk(ids_NV, probs_NV, torch.special.entr(probs_NV).sum(-1), torch.arange(N))


def exact(teacher_NV: Tensor) -> DenseChunk:
    """A target that is the teacher's head on its hidden states: here the logits themselves."""
    return DenseChunk(teacher_NV, Head(torch.eye(V, dtype=teacher_NV.dtype)), torch.arange(N))


def gradient(loss_N: Tensor, logits_NV: Tensor) -> Tensor:
    return torch.autograd.grad(loss_N.sum(), logits_NV)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kl_of_equals_is_zero(dtype: torch.dtype) -> None:
    logits_NV = random_logits(0, dtype).requires_grad_()
    kl_N = forward_kl(logits_NV, whole(logits_NV.detach()))
    limit = 1e-12 if dtype == torch.float64 else 2e-5
    assert kl_N.abs().max() < limit
    assert gradient(kl_N, logits_NV).abs().max() < limit


def test_kl_is_the_definitions() -> None:
    teacher_NV, student_NV = random_logits(0), random_logits(1).requires_grad_()
    expected_N = naive_kl(teacher_NV, student_NV)
    for target, tolerance in ((whole(teacher_NV), 1e-12), (exact(teacher_NV), 3e-6)):  # exact targets are float32
        found_N = forward_kl(student_NV, target)
        torch.testing.assert_close(found_N, expected_N, atol=tolerance, rtol=tolerance)
        expected_grad = gradient(naive_kl(teacher_NV, student_NV), student_NV)
        torch.testing.assert_close(gradient(found_N, student_NV), expected_grad, atol=tolerance, rtol=tolerance)


def test_the_gradient_is_softmax_minus_weights(make_target: Callable[..., SparseChunk]) -> None:
    target, logits_NV = make_target(N, V), random_logits(1).requires_grad_()
    weights_NV = torch.zeros(N, V, dtype=torch.float64).scatter_add_(1, target.ids_NK, target.weights_NK)
    found = gradient(forward_kl(logits_NV, target), logits_NV)
    torch.testing.assert_close(found, logits_NV.softmax(-1) - weights_NV, atol=1e-12, rtol=0)


def test_the_mean_over_sampled_targets_is_the_dense_kl() -> None:
    """Within 4 standard errors at every position but what chance allows among them, and over all of them together."""
    teacher_NV, student_NV, draws = random_logits(0)[::4], random_logits(1)[::4], 120
    probs_NV = teacher_NV.softmax(-1)
    entropy_N, true_ids_N = torch.special.entr(probs_NV).sum(-1), torch.zeros(len(probs_NV), dtype=torch.long)
    uniform_ND = torch.rand(len(probs_NV), draws, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found_DN = torch.stack(
        [
            forward_kl(student_NV, SparseChunk(*varopt(probs_NV, 1 / 50, uniform_N).padded(), entropy_N, true_ids_N))
            for uniform_N in uniform_ND.unbind(1)
        ]
    )
    error_N = found_DN.mean(0) - naive_kl(teacher_NV, student_NV)
    # Sure rows hardly vary: there a tail token that is drawn once in thousands of times hides from the deviation.
    varied = found_DN.std(0) > 0.01
    z = error_N[varied] / (found_DN.std(0)[varied] / draws**0.5)
    assert len(z) > 50
    assert (z.abs() > 4).sum() == 0
    assert error_N.mean().abs() <= 4 * found_DN.mean(1).std() / draws**0.5


def bucketed_naive(teacher_NV: Tensor, student_NV: Tensor, k: int) -> Tensor:
    """KL over the teacher's k best tokens and one outcome for all the others, each side's mass summed up."""
    ids_NK = teacher_NV.topk(k).indices

    def outcomes(logits_NV: Tensor) -> Tensor:
        probs_NV = logits_NV.softmax(-1)
        rest_N1 = probs_NV.scatter(1, ids_NK, 0).sum(-1, keepdim=True)
        return torch.cat([probs_NV.gather(1, ids_NK), rest_N1], dim=1)

    p, q = outcomes(teacher_NV), outcomes(student_NV)
    return (torch.xlogy(p, p) - p * q.log()).sum(-1)


def bucketed(teacher_NV: Tensor, k: int) -> SparseChunk:
    probs_NV = teacher_NV.softmax(-1)
    targets = top_k(probs_NV, k)
    entropy_N = torch.special.entr(probs_NV).sum(-1)
    return SparseChunk(*targets.padded(), entropy_N, torch.arange(N), targets.rest_N)


@pytest.mark.parametrize("k", [1, 17, 1008])
def test_a_rest_is_one_outcome(k: int) -> None:
    teacher_NV, student_NV = random_logits(0), (random_logits(1) * 0.3).requires_grad_()
    found_N, expected_N = forward_kl(student_NV, bucketed(teacher_NV, k)), bucketed_naive(teacher_NV, student_NV, k)
    torch.testing.assert_close(found_N, expected_N, atol=1e-9, rtol=1e-9)
    expected_grad = gradient(bucketed_naive(teacher_NV, student_NV, k), student_NV)
    torch.testing.assert_close(gradient(found_N, student_NV), expected_grad, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("lead", [12.0, 20.0, 40.0])
def test_a_rest_is_well_conditioned(lead: float) -> None:
    """A student in float32 that leaves next to nothing for the bucket still learns that it should."""
    teacher_NV, student_NV = torch.zeros(N, V, dtype=torch.float64), random_logits(1).clamp(5, 9)
    teacher_NV[:, 3], student_NV[:, 3] = 8, 9 + lead
    target = bucketed(teacher_NV, 1)
    low = replace(target, weights_NK=target.weights_NK.float(), rest_N=target.rest_N.float())  # type: ignore[union-attr]

    def loss_and_gradient(logits_NV: Tensor, target: SparseChunk) -> tuple[Tensor, Tensor]:
        logits_NV.requires_grad_()
        loss_N = forward_kl(logits_NV, target)
        return loss_N.detach().double(), gradient(loss_N, logits_NV).double()

    for found, expected in zip(
        loss_and_gradient(student_NV.float(), low), loss_and_gradient(student_NV, target), strict=True
    ):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_a_rest_of_equals_is_zero() -> None:
    logits_NV = random_logits(0).requires_grad_()
    kl_N = forward_kl(logits_NV, bucketed(logits_NV.detach(), 17))
    assert kl_N.abs().max() < 1e-9
    assert gradient(kl_N, logits_NV).abs().max() < 1e-6


def test_cross_entropy_is_the_true_tokens_surprisal() -> None:
    logits_NV = random_logits(1)
    expected_N = -logits_NV.log_softmax(-1)[torch.arange(N), torch.arange(N)]
    torch.testing.assert_close(cross_entropy(logits_NV, whole(logits_NV)), expected_N)


def test_without_some_tokens_it_is_the_kl_over_the_others() -> None:
    """Weights that sum to m < 1: the gradient is that of m KL(p over those left, renormalised ‖ q)."""
    teacher_NV, student_NV = random_logits(0), random_logits(1)[:, :800].requires_grad_()
    probs_NV = teacher_NV.softmax(-1)[:, :800]
    mass_N = probs_NV.sum(-1)
    assert mass_N.min() < 0.8
    target = SparseChunk(torch.arange(800).repeat(N, 1), probs_NV, torch.zeros(N), torch.arange(N))
    found_N = forward_kl(student_NV, target)
    shares_NV = probs_NV / mass_N[:, None]
    expected_N = mass_N * -(shares_NV * student_NV.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(found_N, expected_N, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(
        gradient(found_N, student_NV), mass_N[:, None] * student_NV.softmax(-1) - probs_NV, atol=1e-12, rtol=0
    )


def test_a_chunk_takes_its_rows_of_everything() -> None:
    teacher_NV, student_NV = random_logits(0), random_logits(1)
    for target in (whole(teacher_NV), exact(teacher_NV), bucketed(teacher_NV, 17)):
        parts = [forward_kl(student_NV[start : start + 60], target[start : start + 60]) for start in range(0, N, 60)]
        torch.testing.assert_close(torch.cat(parts), forward_kl(student_NV, target))
        trues = [target[start : start + 60].true_ids_N for start in range(0, N, 60)]
        assert torch.equal(torch.cat(trues), target.true_ids_N)
