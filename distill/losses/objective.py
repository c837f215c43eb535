"""The objective of a training: a divergence from the teacher, chosen by name, mixed with the true token's surprisal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from distill.errors import UserError, did_you_mean
from distill.losses import divergences
from distill.losses.chunks import ChunkTarget, Divergence
from distill.losses.divergences import cross_entropy, forward_kl
from distill.losses.own import is_own, load_divergence, try_divergence

DIVERGENCES: dict[str, Divergence] = {
    divergence.__name__: divergence
    for divergence in (
        divergences.forward_kl,
        divergences.reverse_kl,
        divergences.jsd,
        divergences.skewed_kl,
        divergences.skewed_reverse_kl,
        divergences.adaptive_kl,
        divergences.total_variation,
        divergences.mean_squared_logits,
    )
}
"""All divergences by name."""


@dataclass(frozen=True)
class Mixture:
    """The loss `(1 - alpha) * T^2 * divergence(p, q) + alpha * cross-entropy`: alpha 1 is the text alone.

    T is the temperature of the teacher's distribution; the student's is softened likewise. T^2 keeps the size of the
    gradient (Hinton et al. 2015), which for divergences of second order in p - q falls as 1 / T^2. Total variation is
    of first order: with T^2 its gradient grows as T.
    """

    alpha: float = 0.0
    temperature: float = 1.0
    divergence: Divergence = forward_kl

    def __call__(self, logits_NV: Tensor, target: ChunkTarget) -> Tensor:
        if self.alpha == 1:
            return cross_entropy(logits_NV, target)
        distilled_N = self.temperature**2 * self.divergence(logits_NV / self.temperature, target)
        if self.alpha == 0:
            return distilled_N
        return (1 - self.alpha) * distilled_N + self.alpha * cross_entropy(logits_NV, target)

    def with_teacher_weight(self, share: float) -> Mixture:
        """Return the mixture in which the teacher weighs `(1 - alpha) * share`, and the true token the rest of 1.

        `share` is 0 to 1, for example the learning rate as a share of its peak. At 1 the mixture is this one.
        """
        assert 0 <= share <= 1, share
        return replace(self, alpha=self.alpha + (1 - self.alpha) * (1 - share))


def make_divergence(name: str, beta: float = 0.5, skew: float = 0.1) -> Divergence:
    """Return the divergence of a name with its parameter, or the user's own (`module:function`).

    Raises UserError for a name that is unknown, and a parameter that is out of range.
    """
    if is_own(name):
        return load_divergence(name)
    if name not in DIVERGENCES:
        near = did_you_mean(name, DIVERGENCES)
        raise UserError(f"loss.divergence: {name}: no such divergence{near}, or give one of your own, file.py:function")
    if name == "jsd":
        if not 0 < beta < 1:
            raise UserError(
                f"loss.beta: {beta:g}: must lie between 0 and 1, where jsd is 0 whatever the student: "
                "at the ends use loss.divergence forward_kl (0) or reverse_kl (1)"
            )
        return partial(divergences.jsd, beta=beta)
    if name in ("skewed_kl", "skewed_reverse_kl"):
        if not 0 <= skew < 1:
            raise UserError(f"loss.skew: {skew:g}: must be at least 0 and below 1, where {name} is 0 for every student")
        return partial(divergences.skewed_kl if name == "skewed_kl" else divergences.skewed_reverse_kl, skew=skew)
    return DIVERGENCES[name]


def check_divergence(name: str, scheme: str) -> None:
    """Raise UserError if targets of a scheme (`varopt`, `top_k`, `random`, `hidden`) cannot give a divergence.

    A function of the user's own is tried on such targets.
    """
    if is_own(name):
        try_divergence(load_divergence(name), scheme)
        return
    if name == "forward_kl" or scheme == "hidden":
        return
    if name == "mean_squared_logits":
        raise UserError(
            f"loss.divergence: {name} compares the logits of all tokens, which {scheme} targets do not have: "
            "cache with --cache.scheme hidden (exact), or use forward_kl"
        )
    if scheme != "top_k":
        raise UserError(
            f"loss.divergence: {name} cannot be estimated without bias from {scheme} targets, "
            "which are sparse samples: cache with --cache.scheme hidden (exact) or top_k (with its tail bucket), "
            "or use forward_kl"
        )
