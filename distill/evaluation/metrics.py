"""How close a student is to its teacher, over the full vocabulary: pure functions, and the Metrics that average them.

Shapes: N positions that carry loss, V vocabulary, M bins of confidence. Every position counts the same, however the
positions are cut into chunks, batches and devices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from distill.errors import UserError

BINS = 15
"""Bins of confidence of the expected calibration error, as in Guo et al. 2017 and most reports since."""


def log_probabilities(logits_NV: Tensor) -> Tensor:
    """Log-softmax of each row `[N, V]`, nats, at most 0: in float64 for float64 logits, in float32 for all others."""
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    return torch.log_softmax(logits_NV, dim=-1, dtype=dtype)


def negative_log_likelihood(logp_NV: Tensor, next_ids_N: Tensor) -> Tensor:
    """`-log p(next token)` of each position: `[N]`, nats, from 0 up."""
    return -logp_NV.gather(-1, next_ids_N.unsqueeze(-1)).squeeze(-1)


def kl_divergence(student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
    """Forward KL(teacher ‖ student) of each position: `[N]`, nats, from 0 (equal) up.

    Equals `(p * (log p - log q)).sum(-1)` with p the teacher and q the student (Kullback and Leibler 1951). What is
    summed is `p (log p - log q) - p + q`, the same since p and q each sum to 1, because none of its terms is negative:
    in the plain form terms of both signs cancel, and a rounding error in a row's normaliser enters at first order,
    enough to drown the KL of a student that is close. A token that the teacher rules out (p = 0) contributes q.
    """
    p = teacher_logp_NV.exp()
    # 0 * (-inf - x) is nan; the limit of p log p is 0. In place: nothing here is larger than a chunk of [N, V].
    terms = (teacher_logp_NV - student_logp_NV).mul_(p).masked_fill_(p == 0, 0.0)
    # Below 0 is rounding alone: no term is.
    return terms.sub_(p).add_(student_logp_NV.exp()).sum(-1).clamp_min(0.0)


def acceptance_rate(student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
    """`Σ_v min(p_v, q_v)` of each position: `[N]`, a probability, 0 (disjoint) to 1 (equal), symmetrical.

    The chance that speculative decoding with the student as draft accepts its token; 1 - total variation distance.
    Source: Leviathan, Kalman, Matias, "Fast inference from transformers via speculative decoding", ICML 2023, §3.2.
    """
    return torch.minimum(student_logp_NV, teacher_logp_NV).exp_().sum(-1)


def top1_agreement(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Whether both put the same token first: `[N]`, bool, of logits or log-probabilities; of equals the lowest id."""
    return student_NV.argmax(-1) == teacher_NV.argmax(-1)


def confidence_bins(confidence_N: Tensor, bins: int = BINS) -> Tensor:
    """Number `[N]`, int64, of the bin of equal width that a probability lies in: m for `(m / bins, (m + 1) / bins]`."""
    return (confidence_N * bins).ceil().long().sub_(1).clamp_(0, bins - 1)


def top1_outcomes(logp_NV: Tensor, next_ids_N: Tensor) -> tuple[Tensor, Tensor]:
    """The probability of each row's top-1 token, and whether that is the true next token: `[N]`, `[N]` bool."""
    top1_N = logp_NV.argmax(-1)
    return logp_NV.gather(-1, top1_N.unsqueeze(-1)).squeeze(-1).exp(), top1_N == next_ids_N


def expected_calibration_error(gap_sums_M: Tensor, positions: int) -> float:
    """How far confidence and accuracy are apart, 0 (calibrated) to 1: `Σ_m n_m / N |accuracy_m - confidence_m|`.

    accuracy and confidence are means over the n_m positions of bin m, so n_m cancels: `gap_sums_M` holds, for each bin,
    the sum of (1 if the top-1 token was right, else 0) - its probability. Source: Guo, Pleiss, Sun, Weinberger, "On
    calibration of modern neural networks", ICML 2017, eq. 3. It is biased upwards: N positions of a calibrated model
    give about `0.8 Σ_m sqrt(n_m v_m) / N`, v_m the variance of an outcome in bin m.
    """
    return float(gap_sums_M.abs().sum()) / positions


def perplexity(nll: float) -> float:
    """`exp(nll)` of a mean negative log-likelihood in nats/token, from 1 up; infinite where a float cannot hold it."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


class _MeanOverPositions(Metric):
    """Means over positions of named per-position values, and the calibration of the model that is measured.

    The state is float64 sums and a count, which add up across devices; torchmetrics' MulticlassCalibrationError would
    keep the confidence of every position. The sums stay where the metric is: on the CPU, also when the values come
    from a card, since not every accelerator knows float64; on the card after `.to(card)`, as a sum over several cards
    needs it.
    """

    full_state_update = False
    names: tuple[str, ...] = ()
    gap_sums: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in self.names:
            self.add_state(f"{name}_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("gap_sums", torch.zeros(BINS, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _add(self, logp_NV: Tensor, next_ids_N: Tensor, values: dict[str, Tensor]) -> None:
        """Add N positions: the measured model's log-probabilities, the true tokens, and values `[N]` a name."""
        assert set(values) == set(self.names), (sorted(values), self.names)
        for name, values_N in values.items():
            total = getattr(self, f"{name}_sum")
            setattr(self, f"{name}_sum", total + values_N.to(total.device).double().sum())
        confidence_N, right_N = (outcome_N.to(self.gap_sums.device) for outcome_N in top1_outcomes(logp_NV, next_ids_N))
        gaps_N = right_N.double() - confidence_N.double()
        self.gap_sums = self.gap_sums.index_add(0, confidence_bins(confidence_N), gaps_N)
        self.tokens = self.tokens + next_ids_N.numel()

    def _means(self) -> dict[str, float]:
        """The mean of each name, `ece` and `tokens`; raises UserError when there was no position at all."""
        tokens = int(self.tokens)
        if tokens == 0:
            raise UserError(
                "evaluation: nothing to measure, no held-out position carries loss "
                "(no held-out text, or all of it masked); give more text, or hold more of it out"
            )
        means = {name: float(getattr(self, f"{name}_sum")) / tokens for name in self.names}
        return means | {"ece": expected_calibration_error(self.gap_sums, tokens), "tokens": tokens}


class Fidelity(_MeanOverPositions):
    """A student against its teacher: means over positions of `nll`, `kl`, `top1_agreement` and `acceptance`.

    `nll` is the student's on the true next token (nats/token), `kl` is KL(teacher ‖ student) (nats/token, at least 0),
    the other two are shares between 0 and 1. `ece` is the student's expected calibration error: its probability of its
    top-1 token against how often that is the true next token. `tokens` is the number of positions. The vocabulary is
    the whole one: padded rows of a head are cut off before (`Head.with_rows`).
    """

    names = ("nll", "kl", "top1_agreement", "acceptance")

    @torch.no_grad()
    def update(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor, next_ids_N: Tensor) -> None:
        """Count N positions with loss: both models' logits there, and the token that really came next."""
        assert student_logits_NV.shape == teacher_logits_NV.shape, (student_logits_NV.shape, teacher_logits_NV.shape)
        assert next_ids_N.shape == student_logits_NV.shape[:-1], (next_ids_N.shape, student_logits_NV.shape)
        student_logp_NV = log_probabilities(student_logits_NV)
        teacher_logp_NV = log_probabilities(teacher_logits_NV)
        self._add(
            student_logp_NV,
            next_ids_N,
            {
                "nll": negative_log_likelihood(student_logp_NV, next_ids_N),
                "kl": kl_divergence(student_logp_NV, teacher_logp_NV),
                "top1_agreement": top1_agreement(student_logits_NV, teacher_logits_NV),
                "acceptance": acceptance_rate(student_logp_NV, teacher_logp_NV),
            },
        )

    def compute(self) -> dict[str, float]:
        """The means, `ece` and `tokens`; raises UserError when no position was counted."""
        return self._means()


class Likelihood(_MeanOverPositions):
    """A model alone on real text: `nll` of the true next token (nats/token), `perplexity` = exp(nll), `ece`, `tokens`.

    `ece` is the expected calibration error of the top-1 token.
    """

    names = ("nll",)

    @torch.no_grad()
    def update(self, logits_NV: Tensor, next_ids_N: Tensor) -> None:
        """Count N positions with loss: the model's logits there, and the token that really came next."""
        assert next_ids_N.shape == logits_NV.shape[:-1], (next_ids_N.shape, logits_NV.shape)
        logp_NV = log_probabilities(logits_NV)
        self._add(logp_NV, next_ids_N, {"nll": negative_log_likelihood(logp_NV, next_ids_N)})

    def compute(self) -> dict[str, float]:
        """The mean, its exponential, `ece` and `tokens`; raises UserError when no position was counted."""
        means = self._means()
        return means | {"perplexity": perplexity(means["nll"])}
