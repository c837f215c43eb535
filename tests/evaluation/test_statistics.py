"""Intervals that cover as often as they say, tests that are uniform under the null, and what follows from both."""

from __future__ import annotations

import math
import statistics
from itertools import product

import numpy as np
import pytest

from distill.evaluation.statistics import (
    RANGES,
    ClusterSums,
    compare,
    intervals,
    mean_and_deviation,
    ratio_intervals,
    sign_flip_p,
    speculative,
)


def draw(samples: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sums of a KL and of a share, and positions: unequal samples, alike inside, skewed, and the short ones differ."""
    positions_S = generator.integers(20, 255, size=samples)
    short = positions_S < 100
    mean_S = np.exp(generator.normal(0, 0.35, size=samples)) * (1 + 0.3 * short)
    kl_S = generator.gamma(0.5 * positions_S, 2 * mean_S)  # a sum of exponentials squared and the like, one a position
    chance_S = 1 / (1 + np.exp(-generator.normal(0.4, 0.7, size=samples) + 0.3 * short))
    return np.stack([kl_S, generator.binomial(positions_S, chance_S)], axis=1), positions_S


def percentile(sums_SM: np.ndarray, positions_S: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The plain bootstrap, for comparison."""
    samples = len(positions_S)
    counts_RS = generator.multinomial(samples, np.full(samples, 1 / samples), size=400)
    ratios_RM = (counts_RS @ sums_SM) / (counts_RS @ positions_S)[:, None]
    return np.quantile(ratios_RM, [0.025, 0.975], axis=0).T


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    sums_SM, positions_S = draw(500_000, np.random.default_rng(99))
    return sums_SM.sum(0) / positions_S.sum()


@pytest.mark.parametrize(("samples", "repetitions"), [(16, 1000), (60, 600)])
def test_intervals_cover_the_truth_at_the_stated_rate(truth: np.ndarray, samples: int, repetitions: int) -> None:
    """Within 3.3 deviations of a binomial of 95 % (± 2.3 and ± 2.9 %): 1 of 1,000 such tests would fail by chance."""
    generator, band = np.random.default_rng(samples), 3.3 * math.sqrt(0.95 * 0.05 / repetitions)
    covered, covered_plainly = np.zeros(2), np.zeros(2)
    for seed in range(repetitions):
        drawn = draw(samples, generator)
        found = ratio_intervals(*drawn, resamples=400, seed=seed)
        assert found is not None
        covered += (found[:, 0] <= truth) & (truth <= found[:, 1])
        if samples == 16:
            plain = percentile(*drawn, generator)
            covered_plainly += (plain[:, 0] <= truth) & (truth <= plain[:, 1])
    assert (abs(covered / repetitions - 0.95) < band).all(), covered
    if samples == 16:
        assert (covered_plainly < covered - 0.015 * repetitions).all(), "else the plain bootstrap would do"


def test_the_interval_is_the_bootstrap_t_of_a_plain_program() -> None:
    """One resample at a time, with the residuals written out."""
    sums_SM, positions_S = draw(12, np.random.default_rng(3))
    sums, n, generator = sums_SM[:, 0], positions_S.astype(float), np.random.default_rng(7)

    def ratio_and_error(weights: np.ndarray) -> tuple[float, float]:
        weights = weights / weights.sum()
        ratio = (weights @ sums) / (weights @ n)
        return ratio, math.sqrt(weights @ (sums - ratio * n) ** 2 / (len(n) - 1)) / (weights @ n)

    ratio, error = ratio_and_error(np.ones(12))
    residuals = sums - ratio * n  # Cochran's formula for a ratio's standard error
    assert error == pytest.approx(math.sqrt((residuals**2).sum() / 11 / 12) / n.mean())
    resampled = [ratio_and_error(generator.beta(0.5, 1.5, size=12)) for _ in range(500)]
    low, high = np.quantile([(other - ratio) / other_error for other, other_error in resampled], [0.025, 0.975])
    found = ratio_intervals(sums_SM, positions_S, resamples=500, seed=7)
    assert found is not None
    np.testing.assert_allclose(found[0], [ratio - high * error, ratio - low * error], rtol=1e-9)


def test_the_weights_have_the_moments_of_counts() -> None:
    """Beta(1/2, 3/2) over its mean: variance 1 and third moment 1, as the number of times a sample is drawn."""
    weights = np.random.default_rng(0).beta(0.5, 1.5, size=1_000_000) * 4
    assert [float(((weights - 1) ** power).mean()) for power in (2, 3)] == pytest.approx([1, 1], abs=0.02)


def test_intervals_are_the_same_every_time_and_shrink_with_the_samples() -> None:
    sums_SM, positions_S = draw(400, np.random.default_rng(0))
    widths = []
    for samples in (25, 100, 400):
        first, again = (ratio_intervals(sums_SM[:samples], positions_S[:samples]) for _ in range(2))
        assert first is not None and again is not None and (first == again).all()
        ratios = sums_SM[:samples].sum(0) / positions_S[:samples].sum()
        assert (first[:, 0] < ratios).all() and (ratios < first[:, 1]).all()
        widths.append(first[:, 1] - first[:, 0])
    assert (widths[0] > 1.4 * widths[1]).all() and (widths[1] > 1.4 * widths[2]).all()


def test_resamples_drawn_few_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = draw(30, np.random.default_rng(0))
    whole, p = ratio_intervals(*drawn), sign_flip_p(drawn[0][:, 0] - 100)
    monkeypatch.setattr("distill.evaluation.statistics._DRAWS_AT_A_TIME", 1000)
    np.testing.assert_allclose(ratio_intervals(*drawn), whole, rtol=1e-12)
    assert sign_flip_p(drawn[0][:, 0] - 100) == p


def test_samples_without_positions_say_nothing_and_four_say_too_little() -> None:
    sums_SM, positions_S = draw(6, np.random.default_rng(0))
    found = ratio_intervals(sums_SM, positions_S)
    with_empty = ratio_intervals(np.insert(sums_SM, 2, 0, axis=0), np.insert(positions_S, 2, 0))
    assert found is not None and with_empty is not None and (found == with_empty).all()
    assert ratio_intervals(sums_SM[:5], positions_S[:5]) is not None
    assert ratio_intervals(sums_SM[:4], positions_S[:4]) is None
    assert ratio_intervals(np.insert(sums_SM[:4], 2, 0, axis=0), np.insert(positions_S[:4], 2, 0)) is None


def test_equal_samples_give_a_point() -> None:
    positions_S = np.array([10, 20, 30, 7, 9, 300])
    found = ratio_intervals(np.stack([0.1 * positions_S, 0 * positions_S, positions_S], axis=1), positions_S)
    np.testing.assert_allclose(found, [[0.1, 0.1], [0, 0], [1, 1]], rtol=1e-12)


@pytest.mark.filterwarnings("error")
def test_intervals_stay_in_the_range_of_their_metric_and_finite() -> None:
    """Rare events, where the usual bootstrap-t draws resamples without a spread and its interval has no end."""
    positions_S = np.full(12, 200)
    rare = np.array([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 1.0])
    values = {name: rare for name in RANGES} | {"top1_agreement": 200 - rare, "kl": rare * 1e3, "jsd": 138 - rare}
    found = intervals(ClusterSums(positions_S, values))
    assert set(found) == set(RANGES)
    for name, (low, high) in found.items():
        assert RANGES[name][0] <= low < values[name].sum() / 2400 < high <= RANGES[name][1], name
        assert math.isfinite(high) and type(low) is float
    assert found["acceptance"][0] == 0 and found["acceptance"][1] < 0.1
    assert found["top1_agreement"][1] == 1 and found["kl"][0] == 0


@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_finite_has_no_interval_and_spoils_no_other() -> None:
    sums_SM, positions_S = draw(9, np.random.default_rng(0))
    clean = intervals(ClusterSums(positions_S, {"kl": sums_SM[:, 0]}))
    for bad in (math.inf, math.nan):
        broken = sums_SM[:, 0].copy()
        broken[3] = bad
        assert intervals(ClusterSums(positions_S, {"nll": broken, "kl": sums_SM[:, 0]})) == clean
    assert intervals(ClusterSums(positions_S[:4], {"kl": sums_SM[:4, 0]})) == {}


@pytest.mark.parametrize("samples", [9, 40])
def test_p_is_uniform_under_the_null(samples: int) -> None:
    """Enumerated and drawn: p at most u has a chance of u (never more, up to the drawing), whatever the tails."""
    generator, repetitions = np.random.default_rng(samples), 1000
    p = np.array([sign_flip_p(generator.standard_t(2, size=samples), flips=600) for _ in range(repetitions)])
    for level in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert abs((p <= level).mean() - level) < 3.5 * math.sqrt(level * (1 - level) / repetitions), level
    statistic = np.abs(np.sort(p) - np.arange(1, repetitions + 1) / repetitions).max()
    assert statistic < 1.95 / math.sqrt(repetitions), "Kolmogorov and Smirnov at 1 in 1,000"


def test_p_is_small_under_a_shift() -> None:
    generator = np.random.default_rng(0)
    assert sign_flip_p(generator.normal(1, 1, size=60)) == 1 / 10_001
    assert sign_flip_p(-generator.normal(1, 1, size=60)) == 1 / 10_001
    assert sign_flip_p(generator.normal(3, 1, size=10)) == 2 / 2**10, "of all sign changes only the mirrored is as far"
    assert np.mean([sign_flip_p(generator.normal(0.8, 1, size=20), flips=500) < 0.05 for _ in range(50)]) > 0.7


def test_p_by_enumeration() -> None:
    differences_S = np.random.default_rng(1).normal(0.3, 1, size=11)
    sums = [
        abs(sum(sign * d for sign, d in zip(signs, differences_S, strict=True)))
        for signs in product((-1, 1), repeat=11)
    ]
    expected = np.mean([total >= abs(differences_S.sum()) - 1e-9 for total in sums])
    assert 0.01 < expected < 0.99
    assert sign_flip_p(differences_S) == expected
    assert sign_flip_p(np.append(differences_S, [0.0, 0.0])) == expected
    assert abs(sign_flip_p(differences_S, flips=2000) - expected) < 4 * math.sqrt(0.25 / 2000), "drawn, not enumerated"
    assert sign_flip_p(np.zeros(7)) == 1 and sign_flip_p(np.array([2.0])) == 1
    assert sign_flip_p(np.full(8, 0.1)) == 2 / 2**8, "equal sums, however rounded, are equal"


def sums_of(samples: int, shift: float, seed: int = 0) -> ClusterSums:
    """The same texts for every shift, and a little noise that is the model's own."""
    sums_SM, positions_S = draw(samples, np.random.default_rng(seed))
    noise_S = np.random.default_rng([seed, round(shift * 100)]).normal(0, 0.01, size=samples)
    kl_S = sums_SM[:, 0] + (shift + noise_S) * positions_S
    share_S = np.minimum(sums_SM[:, 1] + (shift + noise_S) * positions_S / 10, positions_S)
    return ClusterSums(positions_S, {"kl": kl_S, "nll": kl_S + 1, "top1_agreement": share_S, "acceptance": share_S})


def test_a_paired_comparison_sees_what_two_intervals_do_not() -> None:
    student, control = sums_of(30, 0.0), sums_of(30, 0.05)
    found = compare(student, control)
    assert list(found) == ["kl", "nll", "top1_agreement", "acceptance"]
    for name, entry in found.items():
        assert entry["difference"] == pytest.approx(student.mean(name) - control.mean(name), rel=1e-9)
        low, high = entry["interval"]
        assert low < entry["difference"] < high < 0
        assert entry["p"] == 1 / 10_001
    alone, other = intervals(student)["kl"], intervals(control)["kl"]
    assert alone[0] < other[0] < alone[1], "the two intervals overlap: texts differ more than models"
    low, high = found["kl"]["interval"]
    assert high - low < 0.1 * (alone[1] - alone[0])


def test_a_comparison_turns_round_with_its_sides() -> None:
    student, control = sums_of(20, 0.0), sums_of(20, 0.05)
    forth, back = compare(student, control)["kl"], compare(control, student)["kl"]
    assert back["difference"] == -forth["difference"] and back["p"] == forth["p"]
    assert back["interval"] == pytest.approx([-end for end in reversed(forth["interval"])])


def test_equal_models_and_few_samples_are_compared_with_care() -> None:
    same = compare(sums_of(20, 0.0), sums_of(20, 0.0))["kl"]
    assert same == {"difference": 0, "interval": [0, 0], "p": 1}
    few = compare(sums_of(3, 0.0), sums_of(3, 0.05))["kl"]
    assert "interval" not in few and few["p"] == 2 / 2**3
    broken = sums_of(20, 0.05)
    broken.values["kl"][2] = math.inf
    assert compare(sums_of(20, 0.0), broken)["kl"] == {"difference": -math.inf}
    with pytest.raises(AssertionError):
        compare(sums_of(20, 0.0), sums_of(20, 0.05, seed=1))


def test_speculative_speedup_by_the_formula_and_by_drawing() -> None:
    found = speculative(0.8, 0.05)
    formula = {draft: (1 - 0.8 ** (draft + 1)) / (0.2 * (draft * 0.05 + 1)) for draft in range(11)}
    assert found["draft_tokens"] == max(formula, key=lambda draft: formula[draft]) == 8
    assert found["speedup"] == pytest.approx(formula[8])
    rejected = np.random.default_rng(0).random((100_000, 8)) >= 0.8
    accepted = np.where(rejected.any(1), rejected.argmax(1), 8)
    assert (accepted + 1).mean() / (8 * 0.05 + 1) == pytest.approx(found["speedup"], rel=0.01)


def test_drafting_pays_when_more_is_accepted_than_a_draft_costs() -> None:
    assert speculative(0.3, 0.3) == speculative(0.2, 1.5) == speculative(0.0, 0.1) == {"draft_tokens": 0, "speedup": 1}
    assert speculative(0.31, 0.3)["speedup"] > 1 and speculative(0.31, 0.3)["draft_tokens"] == 1
    assert speculative(1.0, 0.1) == {"draft_tokens": 10, "speedup": pytest.approx(11 / 2)}
    assert speculative(1.0, 0.1, max_draft=3) == {"draft_tokens": 3, "speedup": pytest.approx(4 / 1.3)}


def test_mean_and_deviation_of_a_sample() -> None:
    values = [3.1, 3.3, 2.9, 3.4]
    found = mean_and_deviation(values)
    assert found["values"] == values and found["mean"] == pytest.approx(3.175)
    assert found["deviation"] == pytest.approx(statistics.stdev(values)) == pytest.approx(np.std(values, ddof=1))
    assert mean_and_deviation([2.5]) == {"mean": 2.5, "values": [2.5]}
