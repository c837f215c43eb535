"""The learning curve: held-out KL against what was learned, fitted to early points and continued to the end.

KL(s) = A · (S(s) + S0)^-α · exp(-γ · d(s)) at optimiser step s. S is the sum of the learning rates so far, each as a
share of the peak, and d is what the rate has lost since its peak (0 at the peak, 1 at zero): a power law of the work,
with a term for the learning rate's decay, after Tissue et al. 2024 ("Scaling Law with Learning Rate Annealing", arXiv
2408.11029, equation 1). Theirs has an irreducible loss in place of S0; a KL to the teacher has none that an early
point could tell.

Few early points say little of α and γ, so these begin from a guess (`PRIOR`): the fit is the most probable curve, and
its interval follows from the curvature there (Laplace).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

PRIOR = {"log_alpha": (math.log(0.25), 0.4), "log_s0": (math.log(5.0), 1.0), "gamma": (0.15, 0.07)}
"""Mean and standard deviation of each parameter before a point is seen: set by hand, not fitted to trainings."""
NOISE = 0.02
"""Standard deviation of log KL around the curve."""
SHARES = (0, 0.005, 0.01, 0.02, 0.03, 0.045, 0.07, 0.1, 0.15, 0.22, 0.35, 0.5, 1)
"""Shares of a training after which it is measured, evenly on a logarithmic scale."""
SAMPLES = 64
"""Held-out samples at most that each of these measurements takes, spread over all of them."""
FEWEST = 4
"""Fewest points that a prediction is made from."""


@dataclass(frozen=True)
class Prediction:
    """A held-out KL in nats a token, with the interval that holds 95 % of the curves that fit."""

    kl: float
    low: float
    high: float


@dataclass(frozen=True)
class Place:
    """A place on the curve: the work S in steps at the peak rate, and the share d that the rate has lost since then."""

    work: float
    decay: float


def measured_steps(total: int) -> set[int]:
    """Return the steps of a training of `total` steps after which a point is measured."""
    return {round(share * total) for share in SHARES}


def places(rate: Callable[[int], float], steps: int) -> list[Place]:
    """Return the places after 0, 1, …, `steps` steps, where step s has `rate(s)` of the peak learning rate."""
    found, work, peak = [Place(0.0, 0.0)], 0.0, 0.0
    for step in range(steps):
        now = rate(step)
        work, peak = work + now, max(peak, now)
        found.append(Place(work, 1 - now / peak if peak else 0.0))
    return found


class LearningCurve:
    """The most probable curve through points of held-out KL."""

    def __init__(self, points: Mapping[Place, float]) -> None:
        """Find the curve. `points` has the KL at each place, in nats a token; one that is not positive is left out."""
        seen = {place: kl for place, kl in points.items() if kl > 0 and math.isfinite(kl)}
        assert seen, "a curve needs a point"
        self._work = np.array([place.work for place in seen])
        self._decay = np.array([place.decay for place in seen])
        self._log_kl = np.log(np.array(list(seen.values())))
        self._means, self._deviations = (np.array(column) for column in zip(*PRIOR.values(), strict=True))
        self._fit()

    def at(self, place: Place) -> Prediction:
        """Return the KL that is predicted at a place."""
        value, gradient = self._curve(self._parameters, np.array([place.work]), np.array([place.decay]))
        spread = 1.96 * math.sqrt(float(gradient[0] @ self._covariance @ gradient[0]) + NOISE**2)
        return Prediction(*(math.exp(float(value[0]) + sign * spread) for sign in (0, -1, 1)))

    def _curve(self, parameters: np.ndarray, work: np.ndarray, decay: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return log KL at each of N places, and its derivatives [N, 4] by (log A, log α, log S0, γ)."""
        log_a, log_alpha, log_s0, gamma = parameters
        alpha, s0 = math.exp(log_alpha), math.exp(log_s0)
        log_work = np.log(work + s0)
        slopes = np.ones_like(work), -alpha * log_work, -alpha * s0 / (work + s0), -decay
        return log_a - alpha * log_work - gamma * decay, np.stack(slopes, 1)

    def _residuals(self, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what is left of points and prior, in standard deviations, and its derivatives."""
        values, slopes = self._curve(parameters, self._work, self._decay)
        prior = (parameters[1:] - self._means) / self._deviations
        prior_slopes = np.concatenate([np.zeros((3, 1)), np.diag(1 / self._deviations)], 1)
        return np.concatenate([(values - self._log_kl) / NOISE, prior]), np.concatenate([slopes / NOISE, prior_slopes])

    def _fit(self) -> None:
        """Find the least squares of the residuals by Levenberg's and Marquardt's method."""
        parameters = np.array([self._log_kl[-1], *self._means])
        left, slopes = self._residuals(parameters)
        damping = 1e-3
        for _ in range(200):
            curvature = slopes.T @ slopes
            step = np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), -slopes.T @ left)
            new_left, new_slopes = self._residuals(parameters + step)
            if not new_left @ new_left < left @ left:
                damping *= 4
                continue
            settled = left @ left - new_left @ new_left < 1e-10
            parameters, left, slopes, damping = parameters + step, new_left, new_slopes, damping / 3
            if settled:
                break
        self._parameters, self._covariance = parameters, np.linalg.inv(slopes.T @ slopes)
