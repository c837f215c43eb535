"""Divergences, likelihood and entropy of a position: against float64 truth, at odd sizes, where they are extreme."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distill.evaluation.metrics import (
    bits_per_byte,
    entropy,
    js_divergence,
    kl_divergence,
    log_probabilities,
    negative_log_likelihood,
    perplexity,
    reverse_kl_divergence,
)

Divergence = Callable[[Tensor, Tensor], Tensor]
N, V = 253, 1009


def draw_logits(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits `[N, V]` with peaks as a language model has them: from sure to open rows, and far from zero mean."""
    generator = torch.Generator().manual_seed(seed)
    sharpness_N1 = torch.rand(N, 1, generator=generator, dtype=torch.float64) * 5
    return (torch.randn(N, V, generator=generator, dtype=torch.float64) * sharpness_N1 + 20).to(dtype)


def draw_ids(seed: int) -> Tensor:
    return torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed))


def naive_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The definition, in the dtype of the logits."""
    p = teacher_logits.softmax(-1)
    return (p * (teacher_logits.log_softmax(-1) - student_logits.log_softmax(-1))).sum(-1)


def naive_reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return naive_kl(teacher_logits, student_logits)


def naive_jsd(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The definition, in the dtype of the logits."""
    logs = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    log_middle = torch.logaddexp(*logs) - math.log(2)
    halves = [torch.where(log.exp() == 0, 0.0, log.exp() * (log - log_middle)).sum(-1) for log in logs]
    return (halves[0] + halves[1]) / 2


PAIRS: dict[str, tuple[Divergence, Divergence]] = {
    "kl": (kl_divergence, naive_kl),
    "reverse_kl": (reverse_kl_divergence, naive_reverse_kl),
    "jsd": (js_divergence, naive_jsd),
}
both = pytest.mark.parametrize(("divergence", "naive"), PAIRS.values(), ids=PAIRS)


def of_logits(divergence: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    return divergence(log_probabilities(student), log_probabilities(teacher))


def library_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return of_logits(kl_divergence, student, teacher)


def test_log_probabilities_are_float32_at_least() -> None:
    assert log_probabilities(draw_logits(0, torch.bfloat16)).dtype == torch.float32
    assert log_probabilities(draw_logits(0, torch.float64)).dtype == torch.float64
    # In bfloat16 itself the rows would miss 1 by percents.
    sums_N = log_probabilities(draw_logits(0, torch.bfloat16)).exp().sum(-1)
    torch.testing.assert_close(sums_N, torch.ones(N), atol=2e-6, rtol=0)


@both
def test_it_matches_the_definition_in_float64(divergence: Divergence, naive: Divergence) -> None:
    student, teacher = draw_logits(1, torch.float64), draw_logits(2, torch.float64)
    found = of_logits(divergence, student, teacher)
    torch.testing.assert_close(found, naive(student, teacher), rtol=1e-12, atol=1e-12)


@both
@pytest.mark.parametrize("distance", [1.0, 1e-1, 1e-2, 1e-3])
def test_in_float32_it_errs_no_more_than_the_naive_program(
    divergence: Divergence, naive: Divergence, distance: float
) -> None:
    teacher = draw_logits(1)
    student = teacher + distance * draw_logits(2)
    truth = naive(student.double(), teacher.double())
    error = (of_logits(divergence, student, teacher).double() - truth).abs()
    naive_error = (naive(student, teacher).double() - truth).abs()
    # Rounding the result itself to float32 costs this much, whatever the program.
    last_bit = torch.finfo(torch.float32).eps / 2 * (1 + truth.mean())
    assert error.mean() <= naive_error.mean() + last_bit
    assert error.max() <= 1e-6 + 1e-5 * truth.max()


@both
def test_a_close_student_is_not_lost_in_rounding(divergence: Divergence, naive: Divergence) -> None:
    """Around 1e-7 nats the definition, computed in float32, is a third of the value off and often negative."""
    teacher = draw_logits(1)
    student = teacher + 1e-3 * torch.randn(N, V, generator=torch.Generator().manual_seed(3))
    truth = naive(student.double(), teacher.double())
    assert 5e-8 < truth.mean() < 1e-6
    assert (of_logits(divergence, student, teacher) - truth).abs().mean() < 0.1 * truth.mean()
    in_float32 = naive(student, teacher)  # the bound above has teeth
    assert (in_float32 - truth).abs().mean() > 0.2 * truth.mean() and in_float32.min() < 0


@both
@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_extreme_logits(divergence: Divergence, naive: Divergence, scale: float) -> None:
    """Most probabilities are 0 in float32, some in float64, and log-probabilities lie hundreds of nats down."""
    student, teacher = (scale * (draw_logits(seed) - 20) for seed in (1, 2))
    assert (teacher.softmax(-1) == 0).double().mean() > 0.5
    found, truth = of_logits(divergence, student, teacher), naive(student.double(), teacher.double())
    assert found.isfinite().all() and truth.isfinite().all()
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=2e-6)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equals_give_exactly_zero(divergence: Divergence, naive: Divergence, dtype: torch.dtype) -> None:
    logits = draw_logits(1, dtype)
    assert of_logits(divergence, logits, logits.clone()).abs().max() == 0
    # The same distributions, other logits: a softmax does not see a row's constant.
    assert of_logits(divergence, logits.double(), logits.double() + 7.0).max() <= 1e-12


@both
def test_it_is_never_negative(divergence: Divergence, naive: Divergence) -> None:
    for seed in range(5):
        teacher = draw_logits(seed)
        noise = torch.randn(N, V, generator=torch.Generator().manual_seed(seed))
        for distance in (0.0, 1e-7, 1e-5, 1e-3, 1.0):
            assert of_logits(divergence, teacher + distance * noise, teacher).min() >= 0


def test_both_kl_have_a_direction() -> None:
    student, teacher = draw_logits(1, torch.float64), draw_logits(2, torch.float64)

    def by_torch(q: Tensor, p: Tensor) -> Tensor:
        terms = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none")
        return terms.sum(-1)

    torch.testing.assert_close(library_kl(student, teacher), by_torch(student, teacher))
    torch.testing.assert_close(of_logits(reverse_kl_divergence, student, teacher), by_torch(teacher, student))
    assert (by_torch(teacher, student) - by_torch(student, teacher)).abs().min() > 1e-6


def test_jsd_is_symmetrical_and_log_2_of_the_disjoint() -> None:
    student, teacher = draw_logits(1), draw_logits(2)
    assert torch.equal(of_logits(js_divergence, student, teacher), of_logits(js_divergence, teacher, student))
    disjoint = torch.tensor([[0.0, 0.0, -math.inf, -math.inf], [300.0, 0.0, 0.0, -300.0]])
    found = of_logits(js_divergence, disjoint, disjoint.flip(-1))
    torch.testing.assert_close(found, torch.full((2,), math.log(2)))
    assert found.max() <= math.log(2) + 1e-7


def test_where_probabilities_vanish() -> None:
    inf = math.inf
    teacher = torch.tensor([[0.0, 0.0, -inf], [0.0, -inf, -inf], [0.0, 0.0, 0.0], [300.0, 0.0, -300.0]])
    student = torch.tensor([[0.0, 0.0, 0.0], [0.0, -inf, 0.0], [0.0, 0.0, -inf], [-300.0, 0.0, 300.0]])
    expected = torch.tensor([math.log(3 / 2), math.log(2), inf, 600.0])
    torch.testing.assert_close(library_kl(student, teacher), expected)
    backwards = torch.tensor([inf, inf, math.log(3 / 2), 600.0])
    torch.testing.assert_close(of_logits(reverse_kl_divergence, student, teacher), backwards)
    by_hand = [
        (math.log(6 / 5) + 2 / 3 * math.log(4 / 5) + math.log(2) / 3) / 2,
        (math.log(4 / 3) + 0.5 * math.log(2 / 3) + 0.5 * math.log(2)) / 2,
    ]
    found = of_logits(js_divergence, student, teacher)
    torch.testing.assert_close(found, torch.tensor([*by_hand, by_hand[0], math.log(2)]))


def test_entropy() -> None:
    logits = draw_logits(1, torch.float64)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy(log_probabilities(logits)), expected)
    assert (entropy(log_probabilities(logits.float())).double() - expected).abs().max() < 2e-5
    edges = torch.tensor([[0.0, -math.inf, -math.inf], [0.0, 0.0, 0.0], [0.0, 0.0, -math.inf], [500.0, 0.0, 0.0]])
    found = entropy(log_probabilities(edges))
    torch.testing.assert_close(found, torch.tensor([0.0, math.log(3), math.log(2), 0.0]))
    assert found.min() >= 0


def test_likelihood_is_cross_entropy() -> None:
    logits, ids = draw_logits(1, torch.float64), draw_ids(1)
    expected = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
    torch.testing.assert_close(negative_log_likelihood(log_probabilities(logits), ids), expected)


def test_likelihood_of_what_is_ruled_out_is_infinite() -> None:
    logits = torch.tensor([[0.0, -math.inf], [0.0, -1000.0]])
    found = negative_log_likelihood(log_probabilities(logits), torch.tensor([1, 1]))
    assert found.tolist() == [math.inf, 1000.0]


def test_perplexity_beyond_a_float_is_infinite() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_bits_per_byte_by_hand() -> None:
    # Four tokens of half a chance each are 4 bits; over 16 bytes of text a quarter bit each.
    assert bits_per_byte(math.log(2), positions=4, text_bytes=16) == pytest.approx(0.25)
