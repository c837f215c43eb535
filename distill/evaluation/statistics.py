"""Uncertainty of a mean over positions, and of a difference of two: intervals and tests that resample whole clusters.

The positions of a document are not independent (one text, one author), so whole documents are drawn (as clusters), or
whole samples if there are few documents: S clusters with n_s positions each; M metrics; R resamples. If one document
fills several samples, these are alike as well, and intervals by sample speak of text like these documents alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MINIMUM_CLUSTERS = 5
"""Least number of clusters for an interval."""
MINIMUM_DOCUMENTS = 10
"""Least number of documents that are resampled; with fewer of them, samples are."""
LEVEL = 0.95
RANGES = {
    **dict.fromkeys(("nll", "kl", "reverse_kl"), (0.0, math.inf)),
    "jsd": (0.0, math.log(2)),
    **dict.fromkeys(("top1_agreement", "top5_agreement", "acceptance"), (0.0, 1.0)),
    "confidence_gap": (-1.0, 1.0),
}
"""Least and largest value of a metric at one position, and so of its mean."""
COMPARED = ("kl", "nll", "top1_agreement", "acceptance")
_DRAWS_AT_A_TIME = 4_000_000


@dataclass(frozen=True, eq=False)
class ClusterSums:
    """Sums of each cluster: positions with loss, `[S]` int64, and each metric over them, `[S]` float64."""

    positions: np.ndarray
    values: Mapping[str, np.ndarray]

    @property
    def tokens(self) -> int:
        """Positions of all clusters together."""
        return int(self.positions.sum())

    def mean(self, name: str) -> float:
        """Return the mean over all positions, each counting the same: a ratio of sums."""
        return float(self.values[name].sum() / self.tokens)


def ratio_intervals(
    sums_SM: np.ndarray, positions_S: np.ndarray, *, resamples: int = 2000, seed: int = 0
) -> np.ndarray | None:
    """Return 95 % intervals `[M, 2]` of the ratios `Σ_s sums / Σ_s positions`; None with fewer than 5 clusters.

    Studentised bootstrap (bootstrap-t: Efron and Tibshirani, "An introduction to the bootstrap", 1993, §12.5) of the
    ratio estimator, whose variance is that of its residuals `e = sums - ratio · positions` (Cochran, "Sampling
    techniques", 1977, §6.4): `Var = mean(e²) / (S - 1) / mean(positions)²`. Resamples weigh each cluster with a number
    from Beta(1/2, 3/2) instead of counting it 0, 1, 2, … times: mean, variance and skewness agree, so it is as
    accurate to second order, but no resample consists of one cluster again and again, whose variance of 0 makes the
    usual bootstrap-t's intervals endless (Owen, "Better bootstrap t confidence intervals for the mean",
    arXiv:2508.10083, 2025).

    Ratios that are the same in all clusters give a point. A ratio that is not finite gives nan. Clusters without
    positions say nothing and are left out. With few and skewed clusters it covers somewhat less than 95 %: 90 % with
    5 clusters whose means vary by a factor 1.8 (one standard deviation), 93 % with 16, 94 % with 60; the percentile
    bootstrap covers 80, 88 and 93 %.
    """
    counted = positions_S > 0
    sums_SM, n_S1 = sums_SM[counted].astype(np.float64), positions_S[counted, None].astype(np.float64)
    samples = len(sums_SM)
    if samples < MINIMUM_CLUSTERS:
        return None
    ratios_M = sums_SM.sum(0) / n_S1.sum()
    finite_M = np.isfinite(ratios_M)
    residuals_SM = np.where(finite_M, sums_SM, 0.0) - np.where(finite_M, ratios_M, 0.0) * n_S1
    # Residuals that are 0 but for rounding are set to 0, or they would count as spread.
    constant_M = np.abs(residuals_SM).max(0) <= 1e-12 * np.abs(np.where(finite_M, sums_SM, 0.0)).max(0)
    residuals_SM[:, constant_M] = 0.0
    error_M = np.sqrt((residuals_SM**2).mean(0) / (samples - 1)) / n_S1.mean()
    generator = np.random.default_rng(seed)
    at_a_time = max(1, _DRAWS_AT_A_TIME // samples)
    t_RM = np.concatenate(
        [
            _studentised(residuals_SM, n_S1, generator.beta(0.5, 1.5, size=(min(at_a_time, resamples - done), samples)))
            for done in range(0, resamples, at_a_time)
        ]
    )
    low_M, high_M = np.quantile(t_RM, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return np.where(finite_M, ratios_M - np.stack([high_M, low_M]) * error_M, np.nan).T


def _studentised(residuals_SM: np.ndarray, n_S1: np.ndarray, weights_RS: np.ndarray) -> np.ndarray:
    """Return `(ratio* - ratio) / standard error*` of each resample, `[R, M]`; 0 where all residuals are 0."""
    n_R1 = weights_RS @ n_S1
    shift_RM = weights_RS @ residuals_SM / n_R1  # ratio* - ratio
    # The resample's own residuals are `residuals - shift · n`. Their weighted sum of squares, multiplied out, is
    # Σ w r² - 2 shift Σ w r n + shift² Σ w n², three matrix products instead of a tensor [R, S, M].
    squares_RM, extent_RM = weights_RS @ residuals_SM**2, shift_RM**2 * (weights_RS @ n_S1**2)
    total_RM = squares_RM - 2 * shift_RM * (weights_RS @ (residuals_SM * n_S1)) + extent_RM
    total_RM = np.maximum(total_RM, 1e-12 * (squares_RM + extent_RM))  # anything less is rounding
    samples, weight_R1 = len(n_S1), weights_RS.sum(1, keepdims=True)
    error_RM = np.sqrt(total_RM * weight_R1 / (samples - 1)) / n_R1
    return np.divide(shift_RM, error_RM, out=np.zeros_like(shift_RM), where=error_RM > 0)


def intervals(sums: ClusterSums) -> dict[str, list[float]]:
    """Return the 95 % interval `[low, high]` of each metric's mean, within its range; absent if there is none."""
    found = ratio_intervals(np.stack(list(sums.values.values()), axis=1), sums.positions)
    if found is None:
        return {}
    clipped = {name: np.clip(pair, *RANGES[name]) for name, pair in zip(sums.values, found, strict=True)}
    return {name: [float(end) for end in pair] for name, pair in clipped.items() if np.isfinite(pair).all()}


def sign_flip_p(differences_S: np.ndarray, *, flips: int = 10_000, seed: int = 0) -> float:
    """Return the two-sided p of "the two are exchangeable within each cluster", from paired differences: in (0, 1].

    It is the share of sign changes whose `|Σ ± difference|` reaches the observed one (permutation test for pairs:
    Fisher 1935; Good, "Permutation, parametric and bootstrap tests of hypotheses", 2005, §3.2). If all `2^S` sign
    changes are no more than `flips`, all are taken. Otherwise `flips` random ones and the observed one are: `(1 +
    count) / (flips + 1)`, which is never 0 (Phipson and Smyth, "Permutation p-values should never be zero", 2010).
    """
    differences_S = differences_S[differences_S != 0].astype(np.float64)  # 0 is the same with either sign
    samples = len(differences_S)
    # Equal sums may differ by rounding.
    reached = abs(differences_S.sum()) - 1e-12 * np.abs(differences_S).sum()
    if samples <= math.log2(flips):
        every_RS = (np.arange(2**samples)[:, None] >> np.arange(samples)) & 1
        return float((np.abs((2.0 * every_RS - 1) @ differences_S) >= reached).mean())
    generator, at_a_time, count = np.random.default_rng(seed), max(1, _DRAWS_AT_A_TIME // samples), 0
    for done in range(0, flips, at_a_time):
        signs_RS = generator.random(size=(min(at_a_time, flips - done), samples)) < 0.5
        count += int((np.abs((2.0 * signs_RS - 1) @ differences_S) >= reached).sum())
    return (1 + count) / (flips + 1)


def compare(student: ClusterSums, control: ClusterSums) -> dict[str, dict[str, Any]]:
    """Compare student minus control, paired by cluster: `{metric: {"difference", "interval", "p"}}` for `COMPARED`.

    `difference` is that of the means over positions, `interval` its 95 % interval (absent below 5 clusters), `p` that
    of `sign_flip_p`. Both are absent if a sum is not finite. The two must come from the same clusters.
    """
    assert np.array_equal(student.positions, control.positions), "paired sums are of the same clusters"
    result: dict[str, dict[str, Any]] = {}
    for name in COMPARED:
        differences_S = student.values[name] - control.values[name]
        result[name] = {"difference": float(differences_S.sum() / student.tokens)}
        if not np.isfinite(differences_S).all():
            continue
        found = ratio_intervals(differences_S[:, None], student.positions)
        if found is not None:
            low, high = RANGES[name]
            result[name]["interval"] = [float(end) for end in np.clip(found[0], low - high, high - low)]
        result[name]["p"] = sign_flip_p(differences_S)
    return result


def speculative(acceptance: float, draft_cost: float, max_draft: int = 10) -> dict[str, Any]:
    """Return the best number of tokens that the student drafts for the teacher at a time, and the speedup.

    The speedup is `(1 - α^(γ+1)) / ((1 - α) (γ c + 1))` with γ drafted tokens, the chance α (`acceptance`, 0 to 1) that
    one is accepted, and c (`draft_cost`) the seconds of a token of the student by those of the teacher. Source:
    Leviathan, Kalman, Matias, "Fast inference from transformers via speculative decoding", ICML 2023, theorem 3.8. It
    takes acceptances for independent, and the teacher's pass over γ + 1 tokens for as fast as over one. 0 drafted
    tokens and a speedup of 1 mean that drafting does not pay (never so when α > c, corollary 3.9).
    """
    assert 0 <= acceptance <= 1 and draft_cost >= 0, (acceptance, draft_cost)

    def speedup(draft: int) -> float:
        return sum(acceptance**accepted for accepted in range(draft + 1)) / (draft * draft_cost + 1)

    best = max(range(max_draft + 1), key=speedup)
    return {"draft_tokens": best, "speedup": speedup(best)}


def mean_and_deviation(values: Sequence[float]) -> dict[str, Any]:
    """Return `{"mean", "deviation", "values"}` of a number for each seed; `deviation` (n - 1) from two seeds on."""
    result: dict[str, Any] = {"mean": statistics.fmean(values), "values": list(values)}
    if len(values) > 1:
        result["deviation"] = statistics.stdev(values)
    return result
