"""Closeness of a student to its teacher at one position, over the full vocabulary: pure functions of logits.

Shapes: N positions that carry loss, V vocabulary, M bins of confidence. Divergences and likelihoods are in nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 15
"""Bins of confidence of the expected calibration error, as in Guo et al. 2017 and most reports since."""


def log_probabilities(logits_NV: Tensor) -> Tensor:
    """Return the log-softmax of each row `[N, V]`, nats, at most 0: in float64 for float64 logits, else in float32."""
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    return torch.log_softmax(logits_NV, dim=-1, dtype=dtype)


def negative_log_likelihood(logp_NV: Tensor, next_ids_N: Tensor) -> Tensor:
    """Return `-log p(next token)` of each position: `[N]`, nats, from 0 up."""
    return -logp_NV.gather(-1, next_ids_N.unsqueeze(-1)).squeeze(-1)


def kl_divergence(student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
    """Return the forward KL(teacher ‖ student) of each position: `[N]`, nats, from 0 (equal) up.

    Equals `(p * (log p - log q)).sum(-1)` with p the teacher and q the student (Kullback and Leibler 1951). The code
    sums `p (log p - log q) - p + q`, which has the same sum since p and q each sum to 1, because none of its terms is
    negative. In the plain form terms of both signs cancel, and a rounding error in a row's normaliser enters at first
    order, enough to drown the KL of a student that is close. A token that the teacher rules out (p = 0) contributes q.
    """
    p = teacher_logp_NV.exp()
    # 0 * (-inf - x) is nan, but the limit of p log p is 0. All is in place, so memory stays at one chunk of [N, V].
    terms = (teacher_logp_NV - student_logp_NV).mul_(p).masked_fill_(p == 0, 0.0)
    # No term is below 0, so a sum below 0 is rounding alone.
    return terms.sub_(p).add_(student_logp_NV.exp()).sum(-1).clamp_min(0.0)


def reverse_kl_divergence(student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
    """Return the reverse KL(student ‖ teacher) of each position: `[N]`, nats, from 0 (equal) up; see `kl_divergence`.

    Equals `(q * (log q - log p)).sum(-1)`. The forward KL grows if the student misses something that the teacher says,
    the reverse KL if the student says something that the teacher would not. It is infinite if the teacher rules out (p
    = 0) a token that the student does not.
    """
    return kl_divergence(teacher_logp_NV, student_logp_NV)


def js_divergence(student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of each position: `[N]`, nats, 0 (equal) to log 2 (disjoint), symmetrical.

    Equals `(KL(p ‖ m) + KL(q ‖ m)) / 2` with `m = (p + q) / 2`: the generalised one of Agarwal et al., "On-policy
    distillation of language models", ICLR 2024, eq. 1, at beta 1/2. Source: Lin, "Divergence measures based on the
    Shannon entropy", IEEE Trans. Inf. Theory 37(1), 1991.

    With `u = |log q - log p|` the summand of a token is `((p + q) a - min(p, q) u) / 2`, where `a = -log((1 + exp(-u))
    / 2)` is the log of the larger over m, and `a - u` that of the smaller. Written with expm1 and log1p it keeps its
    digits around 0, and the rounding of a row's normaliser, which shifts u, enters at second order only.
    """
    p, q = teacher_logp_NV.exp(), student_logp_NV.exp()
    # If both rule a token out (-inf - -inf), any u will do; if only one does, any large u.
    gap = (student_logp_NV - teacher_logp_NV).abs_().nan_to_num_(nan=0.0, posinf=1e4)
    of_larger = gap.neg().expm1_().mul_(0.5).log1p_().neg_()
    terms = of_larger.mul_(p + q).sub_(gap.mul_(torch.minimum(p, q, out=p)))
    return terms.sum(-1).mul_(0.5).clamp(0.0, math.log(2))


def entropy(logp_NV: Tensor) -> Tensor:
    """Return `-Σ_v p_v log p_v` of each position: `[N]`, nats, 0 (sure) to log V."""
    p = logp_NV.exp()
    return (p * logp_NV).masked_fill_(p == 0, 0.0).sum(-1).neg_().clamp_min_(0.0)


def acceptance_rate(student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
    """Return `Σ_v min(p_v, q_v)` of each position: `[N]`, a probability, 0 (disjoint) to 1 (equal), symmetrical.

    This is the chance that speculative decoding with the student as draft accepts its token; 1 - total variation
    distance. The code divides by the mean of Σp and Σq, which rounding leaves near 1, so that equals give 1 and nothing
    exceeds 1. Source: Leviathan, Kalman, Matias, "Fast inference from transformers via speculative decoding", ICML
    2023, §3.2.
    """
    p, q = teacher_logp_NV.exp(), student_logp_NV.exp()
    whole = p.sum(-1) + q.sum(-1)
    return torch.minimum(p, q, out=p).sum(-1).mul_(2) / whole


def top1_agreement(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Return True where both put the same token first: `[N]`, bool. A tie goes to the lowest id.

    The arguments are logits or log-probabilities.
    """
    return student_NV.argmax(-1) == teacher_NV.argmax(-1)


def top5_agreement(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Return the share of the teacher's 5 most probable tokens that are among the student's 5: `[N]`, 0 to 1.

    `|T ∩ S| / 5`, in any order within the five: the overlap at depth 5 (Webber, Moffat, Zobel, "A similarity measure
    for indefinite rankings", TOIS 2010, §3). The arguments are logits or log-probabilities. A tie goes to the lower
    ids. A vocabulary smaller than 5 is taken whole.
    """
    student_ids, teacher_ids = top_ids(student_NV, 5), top_ids(teacher_NV, 5)
    shared = (student_ids[:, :, None] == teacher_ids[:, None, :]).flatten(1).sum(-1)
    return shared.to(torch.float32) / teacher_ids.shape[-1]


def top_ids(values_NV: Tensor, count: int) -> Tensor:
    """Return the ids `[N, count]` of each row's largest values, in no order. A tie goes to the lower ids, on every
    device.
    """
    vocabulary = values_NV.shape[-1]
    if vocabulary <= count:
        return torch.arange(vocabulary, device=values_NV.device).expand(len(values_NV), -1)
    values, ids = values_NV.topk(count + 1)
    ids = ids[:, :count]
    # topk does not say which of equal values it takes, and devices differ; argmax takes the first. Only the border
    # between the last id taken and the first one left out needs it.
    tied = (values[:, count - 1] == values[:, count]).nonzero().squeeze(-1)
    left = values_NV[tied].clamp_min_(torch.finfo(values_NV.dtype).min)  # stays above the -inf of taken ids
    for place in range(count if len(tied) else 0):
        best = left.argmax(-1, keepdim=True)
        ids[tied, place] = best.squeeze(-1)
        left.scatter_(-1, best, -math.inf)
    return ids


def confidence_bins(confidence_N: Tensor, bins: int = BINS) -> Tensor:
    """Return the number `[N]`, int64, of a probability's bin of equal width: m for `(m / bins, (m + 1) / bins]`."""
    return (confidence_N * bins).ceil().long().sub_(1).clamp_(0, bins - 1)


def top1_outcomes(logp_NV: Tensor, next_ids_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probability of each row's top-1 token `[N]`, and True where that is the true next token `[N]`."""
    top1_N = logp_NV.argmax(-1)
    return logp_NV.gather(-1, top1_N.unsqueeze(-1)).squeeze(-1).exp(), top1_N == next_ids_N


def expected_calibration_error(gap_sums_M: Tensor, positions: int) -> float:
    """Return the distance of confidence from accuracy, 0 (calibrated) to 1: `Σ_m n_m / N |accuracy_m - confidence_m|`.

    accuracy and confidence are means over the n_m positions of bin m, so n_m cancels: `gap_sums_M` holds, for each bin,
    the sum of the top-1 token's probability - (1 if it was right, else 0). Source: Guo, Pleiss, Sun, Weinberger, "On
    calibration of modern neural networks", ICML 2017, eq. 3. It is biased upwards: N positions of a calibrated model
    give about `0.8 Σ_m sqrt(n_m v_m) / N`, v_m the variance of an outcome in bin m.
    """
    return float(gap_sums_M.abs().sum()) / positions


def perplexity(nll: float) -> float:
    """Return `exp(nll)` of a mean negative log-likelihood in nats/token, from 1 up; inf if no float can hold it."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def bits_per_byte(nll: float, positions: int, text_bytes: int) -> float:
    """Return `nll · positions / (log 2 · bytes)`: bits a byte of text, from 0 up, comparable across tokenizers.

    `nll` is the mean of `positions` next tokens (nats), `text_bytes` (above 0) the UTF-8 bytes of the text they stand
    for. Source: Gao et al., "The Pile", 2020, §3.1.
    """
    return nll * positions / (math.log(2) * text_bytes)
