"""Agreement, acceptance and calibration of a position: against float64 truth and the libraries' own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distill.evaluation.metrics import (
    BINS,
    acceptance_rate,
    confidence_bins,
    expected_calibration_error,
    log_probabilities,
    top1_agreement,
    top1_outcomes,
    top5_agreement,
    top_ids,
)

N, V = 253, 1009


def draw_logits(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits `[N, V]` with peaks as a language model has them: from sure to open rows, and far from zero mean."""
    generator = torch.Generator().manual_seed(seed)
    sharpness_N1 = torch.rand(N, 1, generator=generator, dtype=torch.float64) * 5
    return (torch.randn(N, V, generator=generator, dtype=torch.float64) * sharpness_N1 + 20).to(dtype)


def naive_ece(logits: Tensor, ids: Tensor) -> float:
    """Guo et al. 2017, eq. 3, in float64, bin by bin: shares of positions times |accuracy - mean confidence|."""
    probability, top1 = logits.double().softmax(-1).max(-1)
    total = 0.0
    for bin in range(BINS):
        inside = (probability > bin / BINS) & (probability <= (bin + 1) / BINS)
        if inside.any():
            accuracy = (top1 == ids)[inside].double().mean()
            total += float(inside.double().mean() * (accuracy - probability[inside].mean()).abs())
    return total


def draw_answers(logits_NV: Tensor, seed: int) -> Tensor:
    """Next tokens drawn from the logits' own distributions: a model of them is calibrated."""
    return logits_NV.double().softmax(-1).multinomial(1, generator=torch.Generator().manual_seed(seed))[:, 0]


def draw_ids(seed: int) -> Tensor:
    return torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed))


def library_acceptance(student: Tensor, teacher: Tensor) -> Tensor:
    return acceptance_rate(log_probabilities(student), log_probabilities(teacher))


def test_acceptance_is_one_minus_total_variation_and_symmetrical() -> None:
    student, teacher = draw_logits(1, torch.float64), draw_logits(2, torch.float64)
    total_variation = 0.5 * (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1)
    torch.testing.assert_close(library_acceptance(student, teacher), 1 - total_variation, rtol=1e-12, atol=1e-12)
    assert torch.equal(library_acceptance(student, teacher), library_acceptance(teacher, student))
    in_float32 = library_acceptance(student.float(), teacher.float())
    assert (in_float32.double() - (1 - total_variation)).abs().max() < 1e-5


def test_acceptance_is_the_rate_of_speculative_decoding() -> None:
    """Draw from the student, accept with probability min(1, p / q): the share accepted is Σ min(p, q)."""
    student, teacher = draw_logits(1)[5:6], draw_logits(2)[5:6]
    q, p = student.softmax(-1)[0], teacher.softmax(-1)[0]
    generator = torch.Generator().manual_seed(0)
    draws = 200_000
    ids = torch.multinomial(q, draws, replacement=True, generator=generator)
    accepted = (torch.rand(draws, generator=generator) < p[ids] / q[ids]).double().mean()
    rate = library_acceptance(student, teacher).item()
    assert 0.05 < rate < 0.95
    assert abs(accepted - rate) < 4 * math.sqrt(rate * (1 - rate) / draws)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_acceptance_of_equals_is_exactly_one_and_never_more(dtype: torch.dtype) -> None:
    logits = draw_logits(1, dtype)
    assert (library_acceptance(logits, logits.clone()) == 1).all()
    for distance in (1e-7, 1e-5, 1e-3):
        near = logits.float() + distance * draw_logits(2)
        assert library_acceptance(near, logits.float()).max() <= 1


def test_acceptance_where_probabilities_vanish() -> None:
    inf = math.inf
    teacher = torch.tensor([[0.0, 0.0, -inf], [0.0, -inf, -inf], [0.0, 0.0, 0.0], [300.0, 0.0, -300.0]])
    student = torch.tensor([[0.0, 0.0, 0.0], [0.0, -inf, 0.0], [0.0, 0.0, -inf], [-300.0, 0.0, 300.0]])
    torch.testing.assert_close(library_acceptance(student, teacher), torch.tensor([2 / 3, 1 / 2, 2 / 3, 0.0]))


def test_top1_agreement_counts_rows_and_breaks_ties_by_the_lowest_id() -> None:
    teacher = torch.tensor([[1.0, 3.0, 2.0], [5.0, 1.0, 5.0], [0.0, 0.0, 1.0]])
    student = torch.tensor([[0.0, 9.0, 8.0], [2.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert top1_agreement(student, teacher).tolist() == [True, True, False]


def test_top5_agreement_by_hand() -> None:
    teacher = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0]] * 4)
    student = torch.tensor(
        [
            [5.0, 6, 7, 8, 9, 4, 3, 2, 1, 0],  # the same five in another order
            [0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9],  # the other five
            [9.0, 8, 7, 6, 0, 5, 4, 3, 2, 1],  # four of them
            [9.0, 0, 0, 0, 0, 8, 7, 6, 5, 4],  # the first alone
        ]
    )
    torch.testing.assert_close(top5_agreement(student, teacher), torch.tensor([1.0, 0.0, 0.8, 0.2]))
    assert (top5_agreement(teacher[:, :3], student[:, :3]) == 1).all(), "of three tokens all are among the five"


def test_top5_agreement_matches_sorting() -> None:
    student, teacher = draw_logits(1), draw_logits(1) + draw_logits(2) / 4
    fives = [logits.argsort(dim=-1, descending=True, stable=True)[:, :5].tolist() for logits in (student, teacher)]
    expected = [len(set(ours) & set(theirs)) / 5 for ours, theirs in zip(*fives, strict=True)]
    assert 0.2 < sum(expected) / N < 0.9
    torch.testing.assert_close(top5_agreement(student, teacher), torch.tensor(expected))
    assert (top5_agreement(teacher, teacher.clone()) == 1).all()


def test_of_equal_values_the_lower_ids_are_among_the_five() -> None:
    """Coarse logits, as half precision leaves them: nearly every row has a tie at the border."""
    coarse = draw_logits(1, torch.bfloat16).float().div(4).round()
    expected = coarse.argsort(dim=-1, descending=True, stable=True)[:, :5].sort(-1).values
    assert (coarse.sort(-1, descending=True).values[:, 4:6].diff() == 0).double().mean() > 0.3
    assert torch.equal(top_ids(coarse, 5).sort(-1).values, expected)
    before = coarse.clone()
    top_ids(coarse, 5)
    assert torch.equal(coarse, before)
    ruled_out = torch.full((1, 9), -math.inf)
    ruled_out[0, 7] = 1.0
    assert sorted(top_ids(ruled_out, 5)[0].tolist()) == [0, 1, 2, 3, 7]


def measured_ece(logits: Tensor, ids: Tensor) -> float:
    confidence_N, right_N = top1_outcomes(log_probabilities(logits), ids)
    gaps_N = confidence_N.double() - right_N.double()
    sums_M = torch.zeros(BINS, dtype=torch.float64).index_add(0, confidence_bins(confidence_N), gaps_N)
    return expected_calibration_error(sums_M, len(ids))


def test_calibration_error_matches_the_definition_in_float64() -> None:
    for seed in range(3):
        for ids in (draw_ids(seed), draw_answers(draw_logits(seed), seed), draw_logits(seed).argmax(-1)):
            expected = naive_ece(draw_logits(seed, torch.float64), ids)
            assert 0.01 < expected < 1
            assert measured_ece(draw_logits(seed, torch.float64), ids) == pytest.approx(expected, rel=1e-12)
            assert measured_ece(draw_logits(seed), ids) == pytest.approx(expected, rel=1e-5)


def test_calibration_error_is_that_of_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, ids = draw_logits(1), draw_answers(draw_logits(1), 1)
    theirs = multiclass_calibration_error(logits.softmax(-1), ids, num_classes=V, n_bins=BINS)
    assert measured_ece(logits, ids) == pytest.approx(float(theirs), rel=1e-4)


def test_a_calibrated_model_has_no_calibration_error_and_a_conceited_one_has_it() -> None:
    """Answers drawn from the model itself: what is left is the noise of a finite sample, here under half a percent."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(100_000, 5, generator=generator) * torch.rand(100_000, 1, generator=generator) * 5
    ids = draw_answers(logits, 1)
    assert measured_ece(logits, ids) < 0.005
    probability, top1 = (2 * logits).softmax(-1).max(-1)  # twice as sure, right just as often
    excess = float(probability.mean() - (top1 == ids).double().mean())
    assert excess > 0.08
    assert excess - 1e-6 <= measured_ece(2 * logits, ids) < excess + 0.01
    assert measured_ece(0.5 * logits, ids) > 0.1


def test_bins_are_of_equal_width_and_closed_above() -> None:
    edges = torch.arange(BINS + 1, dtype=torch.float64) / BINS
    middles = (edges[1:] + edges[:-1]) / 2
    assert confidence_bins(middles).tolist() == list(range(BINS))
    assert confidence_bins(torch.tensor([0.0, 1e-9, 0.25, 0.5, 0.75, 1.0]), bins=4).tolist() == [0, 0, 0, 1, 2, 3]
    assert confidence_bins(torch.tensor([1.0 + 1e-6])).tolist() == [BINS - 1]  # a softmax may round beyond 1


def test_opposite_errors_cancel_within_a_bin_and_not_between_bins() -> None:
    def logits_of(*sure: float) -> Tensor:
        probability = torch.tensor(sure, dtype=torch.float64)
        return torch.stack([probability, 1 - probability], -1).log()

    right, wrong = 0, 1
    # One bin, half of them right at 0.51: |0.5 - 0.51|. Two bins: right at 0.51, wrong at 0.9: (0.49 + 0.9) / 2.
    assert measured_ece(logits_of(0.51, 0.51), torch.tensor([right, wrong])) == pytest.approx(0.01)
    assert measured_ece(logits_of(0.51, 0.9), torch.tensor([right, wrong])) == pytest.approx(0.695)
