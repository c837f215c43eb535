"""Metrics of the evaluation: against float64 truth, at odd sizes, however the positions are cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distill.errors import UserError
from distill.evaluation.metrics import (
    BINS,
    Fidelity,
    Likelihood,
    acceptance_rate,
    confidence_bins,
    kl_divergence,
    log_probabilities,
    negative_log_likelihood,
    perplexity,
    top1_agreement,
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


def naive_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The definition, in the dtype of the logits."""
    p = teacher_logits.softmax(-1)
    return (p * (teacher_logits.log_softmax(-1) - student_logits.log_softmax(-1))).sum(-1)


def library_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return kl_divergence(log_probabilities(student), log_probabilities(teacher))


def library_acceptance(student: Tensor, teacher: Tensor) -> Tensor:
    return acceptance_rate(log_probabilities(student), log_probabilities(teacher))


def test_log_probabilities_are_float32_at_least() -> None:
    assert log_probabilities(draw_logits(0, torch.bfloat16)).dtype == torch.float32
    assert log_probabilities(draw_logits(0, torch.float64)).dtype == torch.float64
    # In bfloat16 itself the rows would miss 1 by percents.
    sums_N = log_probabilities(draw_logits(0, torch.bfloat16)).exp().sum(-1)
    torch.testing.assert_close(sums_N, torch.ones(N), atol=2e-6, rtol=0)


def test_kl_matches_the_definition_in_float64() -> None:
    student, teacher = draw_logits(1, torch.float64), draw_logits(2, torch.float64)
    torch.testing.assert_close(library_kl(student, teacher), naive_kl(student, teacher), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("distance", [1.0, 1e-1, 1e-2, 1e-3])
def test_kl_in_float32_errs_no_more_than_the_naive_program(distance: float) -> None:
    teacher = draw_logits(1)
    student = teacher + distance * draw_logits(2)
    truth = naive_kl(student.double(), teacher.double())
    error = (library_kl(student, teacher).double() - truth).abs()
    naive_error = (naive_kl(student, teacher).double() - truth).abs()
    # Rounding the result itself to float32 costs this much, whatever the program.
    last_bit = torch.finfo(torch.float32).eps / 2 * (1 + truth.mean())
    assert error.mean() <= naive_error.mean() + last_bit
    assert error.max() <= 1e-6 + 1e-5 * truth.max()


def test_kl_of_a_close_student_is_not_lost_in_rounding() -> None:
    """Around a KL of 4e-7 nats the definition, computed in float32, is a third of the value off and often negative."""
    teacher = draw_logits(1)
    student = teacher + 1e-3 * torch.randn(N, V, generator=torch.Generator().manual_seed(3))
    truth = naive_kl(student.double(), teacher.double())
    assert 1e-7 < truth.mean() < 1e-6
    assert (library_kl(student, teacher) - truth).abs().mean() < 0.1 * truth.mean()
    naive = naive_kl(student, teacher)  # the bound above has teeth
    assert (naive - truth).abs().mean() > 0.2 * truth.mean() and naive.min() < 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_kl_of_equals_is_zero(dtype: torch.dtype) -> None:
    logits = draw_logits(1, dtype)
    assert library_kl(logits, logits).max() <= 1e-7
    # The same distributions, other logits: a softmax does not see a row's constant.
    assert library_kl(logits.double(), logits.double() + 7.0).max() <= 1e-12


def test_kl_is_never_negative() -> None:
    for seed in range(5):
        teacher = draw_logits(seed)
        noise = torch.randn(N, V, generator=torch.Generator().manual_seed(seed))
        for distance in (0.0, 1e-7, 1e-5, 1e-3, 1.0):
            assert library_kl(teacher + distance * noise, teacher).min() >= 0


def test_kl_has_a_direction() -> None:
    student, teacher = draw_logits(1, torch.float64), draw_logits(2, torch.float64)
    by_torch = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(library_kl(student, teacher), by_torch)
    assert (library_kl(teacher, student) - by_torch).abs().min() > 1e-6


def test_kl_where_probabilities_vanish() -> None:
    inf = math.inf
    teacher = torch.tensor([[0.0, 0.0, -inf], [0.0, -inf, -inf], [0.0, 0.0, 0.0], [300.0, 0.0, -300.0]])
    student = torch.tensor([[0.0, 0.0, 0.0], [0.0, -inf, 0.0], [0.0, 0.0, -inf], [-300.0, 0.0, 300.0]])
    expected = torch.tensor([math.log(3 / 2), math.log(2), inf, 600.0])
    torch.testing.assert_close(library_kl(student, teacher), expected)
    torch.testing.assert_close(library_acceptance(student, teacher), torch.tensor([2 / 3, 1 / 2, 2 / 3, 0.0]))


def test_acceptance_is_one_minus_total_variation_and_symmetrical() -> None:
    student, teacher = draw_logits(1, torch.float64), draw_logits(2, torch.float64)
    total_variation = 0.5 * (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1)
    torch.testing.assert_close(library_acceptance(student, teacher), 1 - total_variation, rtol=1e-12, atol=1e-12)
    assert torch.equal(library_acceptance(student, teacher), library_acceptance(teacher, student))
    torch.testing.assert_close(library_acceptance(teacher, teacher), torch.ones(N, dtype=torch.float64))
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


def test_top1_agreement_counts_rows_and_breaks_ties_by_the_lowest_id() -> None:
    teacher = torch.tensor([[1.0, 3.0, 2.0], [5.0, 1.0, 5.0], [0.0, 0.0, 1.0]])
    student = torch.tensor([[0.0, 9.0, 8.0], [2.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert top1_agreement(student, teacher).tolist() == [True, True, False]


def test_likelihood_is_cross_entropy() -> None:
    logits, ids = draw_logits(1, torch.float64), draw_ids(1)
    expected = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
    torch.testing.assert_close(negative_log_likelihood(log_probabilities(logits), ids), expected)
    metric = Likelihood()
    metric.update(logits, ids)
    values = metric.compute()
    assert values["nll"] == pytest.approx(expected.mean().item(), rel=1e-12)
    assert values["perplexity"] == pytest.approx(math.exp(values["nll"]), rel=1e-12)
    assert values["tokens"] == N


def measured_ece(logits: Tensor, ids: Tensor) -> float:
    metric = Likelihood()
    metric.update(logits, ids)
    return metric.compute()["ece"]


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


def test_perplexity_beyond_a_float_is_infinite() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_fidelity_matches_a_dense_float64_program() -> None:
    student, teacher, ids = draw_logits(1), draw_logits(2), draw_ids(1)
    metric = Fidelity()
    metric.update(student, teacher, ids)
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    expected = {
        "nll": -q[torch.arange(N), ids].log().mean(),
        "kl": (p * (p.log() - q.log())).sum(-1).mean(),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double().mean(),
        "acceptance": torch.minimum(p, q).sum(-1).mean(),
        "ece": naive_ece(student, ids),
        "tokens": N,
    }
    assert metric.compute() == pytest.approx({key: float(value) for key, value in expected.items()}, rel=2e-6)


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 252, 253])
def test_means_do_not_depend_on_how_positions_are_cut(chunk: int) -> None:
    student, teacher, ids = draw_logits(1), draw_logits(2), draw_ids(1)
    whole, cut, alone = Fidelity(), Fidelity(), Likelihood()
    whole.update(student, teacher, ids)
    for rows in torch.arange(N).split(chunk):
        cut.update(student[rows], teacher[rows], ids[rows])
        cut.update(student[:0], teacher[:0], ids[:0])  # a batch without loss changes nothing
        alone.update(student[rows], ids[rows])
    # What is left is the last bit of a row's own sums; 255 / 253 would show were chunks averaged.
    assert cut.compute() == pytest.approx(whole.compute(), rel=1e-7)
    assert alone.compute() == pytest.approx(
        {key: whole.compute()[key] for key in ("nll", "ece", "tokens")}
        | {"perplexity": perplexity(whole.compute()["nll"])},
        rel=1e-6,
    )


def test_sums_keep_what_float32_would_lose() -> None:
    """After 2^24 positions a float32 count stands still, and its sums round each chunk away."""
    metric = Likelihood()
    metric.nll_sum += 2.0**27
    metric.tokens += 2**24
    for _ in range(4):
        metric.update(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
    values = metric.compute()
    assert values["tokens"] == 2**24 + 4
    assert values["nll"] * values["tokens"] - 2.0**27 == pytest.approx(4 * math.log(2), rel=1e-6)


def test_devices_add_up() -> None:
    """Two processes' states, added as torchmetrics adds them, give the mean over all positions."""
    student, teacher, ids = draw_logits(1), draw_logits(2), draw_ids(1)
    whole, first, second = Fidelity(), Fidelity(), Fidelity()
    whole.update(student, teacher, ids)
    first.update(student[:50], teacher[:50], ids[:50])
    second.update(student[50:], teacher[50:], ids[50:])
    assert all(reduce is torch.sum or reduce.__name__ == "dim_zero_sum" for reduce in first._reductions.values())
    for name in first._defaults:
        setattr(first, name, getattr(first, name) + getattr(second, name))
    assert first.compute() == pytest.approx(whole.compute(), rel=1e-7)


def test_reset_forgets() -> None:
    metric = Fidelity()
    metric.update(draw_logits(1), draw_logits(2), draw_ids(1))
    metric.reset()
    metric.update(draw_logits(2), draw_logits(2), draw_ids(1))
    values = metric.compute()
    assert values["kl"] <= 1e-7 and values["top1_agreement"] == 1 and values["tokens"] == N
    assert values["acceptance"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("metric", [Fidelity(), Likelihood()])
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_measured_is_an_error_not_nan(metric: Fidelity | Likelihood) -> None:
    with pytest.raises(UserError, match="no held-out position carries loss"):
        metric.compute()
    empty = [torch.empty(0, V)] * (len(metric.names) // 4 + 1)
    metric.update(*empty, torch.empty(0, dtype=torch.int64))
    with pytest.raises(UserError, match="no held-out position carries loss"):
        metric.compute()


def test_a_nan_is_not_swept_under_a_mean() -> None:
    logits = draw_logits(1)
    broken = logits.clone()
    broken[17, 3] = math.nan
    for student, teacher in ((broken, logits), (logits, broken)):
        metric = Fidelity()
        metric.update(student, teacher, draw_ids(1))
        assert math.isnan(metric.compute()["kl"]) and math.isnan(metric.compute()["acceptance"])
        assert math.isnan(metric.compute()["ece"]) == (student is broken)


def test_vocabularies_must_match() -> None:
    with pytest.raises(AssertionError):
        Fidelity().update(draw_logits(1)[:, :-1], draw_logits(2), draw_ids(1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_values_from_a_card_meet_sums_on_the_cpu() -> None:
    student, teacher, ids = draw_logits(1), draw_logits(2), draw_ids(1)
    here, there, moved = Fidelity(), Fidelity(), Fidelity().to("cuda")
    here.update(student, teacher, ids)
    for metric in (there, moved):
        metric.update(student.cuda(), teacher.cuda(), ids.cuda())
        assert metric.compute() == pytest.approx(here.compute(), rel=1e-5)
