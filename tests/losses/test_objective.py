"""The objective of a training: the mixture and its weights, names of the experiment file, refused combinations."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from distill.errors import UserError
from distill.experiment import configuration
from distill.experiment.configuration import LossConfig
from distill.experiment.teacher_sections import CacheConfig
from distill.losses.chunks import DenseChunk, SparseChunk
from distill.losses.divergences import cross_entropy, forward_kl, mean_squared_logits
from distill.losses.objective import DIVERGENCES, Mixture, check_divergence, make_divergence
from distill.models.language_model import Head

N, V = 61, 211
NAMES, SCHEMES = sorted(DIVERGENCES), ("varopt", "random", "top_k", "hidden")


def random_logits(seed: int, scale: float = 2.0) -> Tensor:
    return torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + 5


def whole(teacher_NV: Tensor) -> SparseChunk:
    """A target with an entry for every token."""
    probs_NV = teacher_NV.softmax(-1)
    ids_NV = torch.arange(V).repeat(N, 1)
    return SparseChunk(ids_NV, probs_NV, torch.special.entr(probs_NV).sum(-1), torch.arange(N))


def exact(teacher_NV: Tensor, temperature: float = 1.0) -> DenseChunk:
    return DenseChunk(teacher_NV, Head(torch.eye(V, dtype=torch.float64)), torch.arange(N), temperature)


def value_and_gradient(
    objective: Mixture, logits_NV: Tensor, target: SparseChunk | DenseChunk
) -> tuple[Tensor, Tensor]:
    logits_NV = logits_NV.clone().requires_grad_()
    loss_N = objective(logits_NV, target)
    return loss_N.detach(), torch.autograd.grad(loss_N.sum(), logits_NV)[0]


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_mixture(alpha: float, temperature: float) -> None:
    """`(1 - alpha) T² KL(teacher at T || student at T) + alpha cross-entropy`."""
    teacher_NV, student_NV = random_logits(0), random_logits(1)
    found_N = Mixture(alpha, temperature)(student_NV, whole(teacher_NV / temperature))
    log_p, log_q = ((logits_NV / temperature).log_softmax(-1) for logits_NV in (teacher_NV, student_NV))
    kl_N = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
    surprisal_N = -student_NV.log_softmax(-1)[torch.arange(N), torch.arange(N)]
    torch.testing.assert_close(found_N, (1 - alpha) * kl_N + alpha * surprisal_N)


@pytest.mark.parametrize("name", NAMES)
def test_the_mixture_of_every_divergence(name: str) -> None:
    teacher_NV, student_NV = random_logits(0), random_logits(1)
    divergence = make_divergence(name, beta=0.3, skew=0.2)
    target = exact(teacher_NV, temperature=2.5)
    expected_N = 0.7 * 2.5**2 * divergence(student_NV / 2.5, target) + 0.3 * cross_entropy(student_NV, target)
    torch.testing.assert_close(Mixture(0.3, 2.5, divergence)(student_NV, target), expected_N)


def test_a_hot_mixture_matches_logits() -> None:
    """T² KL and its gradient go to half the mean squared difference of the logits; the error falls as 1 / T."""
    teacher_NV, student_NV = random_logits(0, 0.5), random_logits(1, 0.5)
    limit = value_and_gradient(Mixture(0, 1, mean_squared_logits), student_NV, exact(teacher_NV))
    errors = []
    for temperature in (1.0, 30.0, 300.0):
        hot = value_and_gradient(Mixture(0, temperature), student_NV, whole(teacher_NV / temperature))
        errors.append([float((2 * a - b).norm() / b.norm()) for a, b in zip(hot, limit, strict=True)])
    for cold, warm, hot in zip(*errors, strict=True):
        assert cold > 0.03 and warm < 0.02 and 8 < warm / hot < 12


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_squared_logits_know_no_temperature(temperature: float) -> None:
    teacher_NV, student_NV = random_logits(0), random_logits(1)
    plain = value_and_gradient(Mixture(0, 1, mean_squared_logits), student_NV, exact(teacher_NV))
    tempered = value_and_gradient(
        Mixture(0, temperature, mean_squared_logits), student_NV, exact(teacher_NV, temperature)
    )
    for found, expected in zip(tempered, plain, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_share_scales_the_teachers_weight(alpha: float) -> None:
    """Weights of teacher and true token: `(1 - alpha) share`, and the rest of 1."""
    mixture, target, logits_NV = Mixture(alpha, 2.0), whole(random_logits(0) / 2), random_logits(1)
    assert mixture.with_teacher_weight(1) == mixture
    assert mixture.with_teacher_weight(0) == Mixture(1.0, 2.0)
    for share in (0.0, 0.25, 0.9, 1.0):
        weight = (1 - alpha) * share
        expected_N = weight * 4 * forward_kl(logits_NV / 2, target) + (1 - weight) * cross_entropy(logits_NV, target)
        torch.testing.assert_close(mixture.with_teacher_weight(share)(logits_NV, target), expected_N)


def test_a_share_keeps_the_divergence() -> None:
    divergence = make_divergence("jsd", beta=0.2)
    assert Mixture(0.1, 3.0, divergence).with_teacher_weight(0.5) == Mixture(0.55, 3.0, divergence)


def test_names_are_the_experiment_files() -> None:
    assert set(configuration.DIVERGENCES) == set(DIVERGENCES)
    told = LossConfig.__dataclass_fields__["divergence"]
    assert told.default in DIVERGENCES
    assert set(get_args(get_type_hints(CacheConfig)["scheme"])) == set(SCHEMES)


def test_defaults_are_the_experiment_files() -> None:
    defaults, target, logits_NV = LossConfig(), exact(random_logits(0)), random_logits(1)
    for name, divergence in DIVERGENCES.items():
        made = make_divergence(name, beta=defaults.beta, skew=defaults.skew)
        assert torch.equal(made(logits_NV, target), divergence(logits_NV, target))
        assert torch.equal(make_divergence(name)(logits_NV, target), divergence(logits_NV, target))


def test_parameters_reach_their_divergences_alone() -> None:
    target, logits_NV = exact(random_logits(0)), random_logits(1)

    def changed(**parameters: float) -> set[str]:
        return {
            name
            for name in NAMES
            if not torch.equal(
                make_divergence(name, **parameters)(logits_NV, target), make_divergence(name)(logits_NV, target)
            )
        }

    assert changed(beta=0.2) == {"jsd"}
    assert changed(skew=0.4) == {"skewed_kl", "skewed_reverse_kl"}


@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("jsd", {"beta": 0}, "loss.beta: 0"),
        ("jsd", {"beta": 1}, "reverse_kl (1)"),
        ("jsd", {"beta": 1.5}, "loss.beta: 1.5"),
        ("skewed_kl", {"skew": 1}, "loss.skew: 1"),
        ("skewed_reverse_kl", {"skew": -0.1}, "loss.skew: -0.1"),
        ("skewed_kl", {"skew": float("nan")}, "loss.skew: nan"),
        ("revers_kl", {}, "did you mean 'reverse_kl'?"),
    ],
)
def test_parameters_out_of_range_are_refused(name: str, parameters: dict[str, float], says: str) -> None:
    with pytest.raises(UserError) as error:
        make_divergence(name, **parameters)
    assert says in str(error.value)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", NAMES)
def test_what_targets_cannot_estimate_is_refused(name: str, scheme: str) -> None:
    can = name == "forward_kl" or scheme == "hidden" or (scheme == "top_k" and name != "mean_squared_logits")
    if can:
        check_divergence(name, scheme)
        return
    with pytest.raises(UserError) as error:
        check_divergence(name, scheme)
    message = str(error.value)
    assert message.startswith(f"loss.divergence: {name} ") and scheme in message
    assert "--cache.scheme hidden" in message and "forward_kl" in message
    assert ("top_k (with its tail bucket)" in message) == (name != "mean_squared_logits")
