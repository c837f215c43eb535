"""Distances of hidden states: the definition's values and gradients, nothing for the teacher, refusals."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from distill.errors import UserError
from distill.experiment.configuration import LossConfig
from distill.losses.features import check_features, feature_distance

N, D = 53, 29
KINDS = get_args(get_type_hints(LossConfig)["feature"])


def states(seed: int) -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 1


def naive(student_ND: Tensor, teacher_ND: Tensor, kind: str) -> Tensor:
    if kind == "mse":
        return ((student_ND - teacher_ND) ** 2).sum(-1) / D
    return 1 - (student_ND * teacher_ND).sum(-1) / (student_ND.norm(dim=-1) * teacher_ND.norm(dim=-1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_definition(kind: str) -> None:
    student_ND, teacher_ND = states(0).requires_grad_(), states(1).requires_grad_()
    found_N, expected_N = feature_distance(student_ND, teacher_ND, kind), naive(student_ND, teacher_ND, kind)
    torch.testing.assert_close(found_N, expected_N)
    weights_N = torch.linspace(-1, 2, N, dtype=torch.float64)
    (found,) = torch.autograd.grad(found_N @ weights_N, student_ND, retain_graph=True)
    (expected,) = torch.autograd.grad(expected_N @ weights_N, student_ND)
    torch.testing.assert_close(found, expected)
    assert torch.autograd.grad(found_N.sum(), teacher_ND, allow_unused=True) == (None,)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    student_ND = states(0)[:5].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: feature_distance(x, states(1)[:5], kind), student_ND)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_are_at_zero(kind: str) -> None:
    assert feature_distance(states(0).float(), states(0).float(), kind).abs().max() < 1e-6


def test_a_cosine_knows_directions_alone() -> None:
    scale_N1 = torch.linspace(0.01, 100, N, dtype=torch.float64)[:, None]
    expected_N = feature_distance(states(0), states(1), "cosine")
    torch.testing.assert_close(feature_distance(states(0) * scale_N1, states(1), "cosine"), expected_N)
    assert (feature_distance(-states(1), states(1), "cosine") - 2).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_states_are_compared_in_float32(kind: str) -> None:
    """Under autocast too; a student state of zeros has a finite gradient."""
    student_ND, teacher_ND = states(0).bfloat16(), states(1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found_N = feature_distance(student_ND, teacher_ND, kind)
    assert found_N.dtype == torch.float32
    torch.testing.assert_close(
        found_N.double(), naive(student_ND.double(), teacher_ND.double(), kind), atol=1e-6, rtol=1e-6
    )
    zeros_ND = torch.zeros(N, D, requires_grad=True)
    feature_distance(zeros_ND, teacher_ND, kind).sum().backward()
    assert zeros_ND.grad is not None and zeros_ND.grad.isfinite().all()


def test_features_need_hidden_states() -> None:
    check_features(0.0, "varopt")
    check_features(0.5, "hidden")
    for scheme in ("varopt", "top_k", "random"):
        with pytest.raises(UserError, match=f"loss.feature_weight: {scheme} .*--cache.scheme hidden"):
            check_features(0.5, scheme)
    with pytest.raises(UserError, match="negative"):
        check_features(-1.0, "hidden")
