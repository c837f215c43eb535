"""Divergences between the teacher p and the student q, as pure functions of a chunk of positions: `[N]` nats.

All compare p and q over the same outcomes. For exact targets these are the V tokens. For targets with a rest they are
the K entries and one outcome more, "any other token". The shape of the tail is lost, so an f-divergence is at most that
of the exact targets (data processing inequality). Sparse samples (varopt, random) are right on average, which only the
forward KL, whose gradient is linear in p, can use: the other divergences refuse them.
The gradient flows into the student alone. Shapes: N positions, V vocabulary, K entries of a target, O outcomes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.losses.chunks import ChunkTarget, DenseChunk, SparseChunk

_NOWHERE = -1e4
"""Log-probability of a place that is no outcome, on both sides: finite, so that no gradient is NaN, and exp() is 0."""


def forward_kl(logits_NV: Tensor, target: ChunkTarget) -> Tensor:
    """Return KL(p‖q) `= Σ p (log p − log q)`. Source: Hinton et al. 2015.

    For sparse samples it is `Σ_k w_k (logsumexp(z) − z_k) − H(p)`, whose expectation over unbiased targets equals the
    above, and whose gradient in the logits z is `m softmax(z) − w` with m the sum of the weights. m is 1, or less if
    tokens were taken out of the vocabulary: then the gradient is that of m times the KL over the tokens that are left.
    A single position can be below 0 if the target is a sample.
    """
    if isinstance(target, SparseChunk) and target.rest_N is None:
        surprisal_NK = torch.logsumexp(logits_NV, dim=-1, keepdim=True) - logits_NV.gather(1, target.ids_NK)
        return (target.weights_NK.detach() * surprisal_NK).sum(-1) - target.entropy_N
    outcomes = _outcomes(logits_NV, target)
    return _kl(outcomes.teacher_NO, outcomes.student_NO)


def reverse_kl(logits_NV: Tensor, target: ChunkTarget) -> Tensor:
    """Return KL(q‖p) `= Σ q (log q − log p)`. Source: Gu et al. 2024, "MiniLLM" (there on text by the student)."""
    outcomes = _outcomes(logits_NV, target)
    return _kl(outcomes.student_NO, outcomes.teacher_NO)


def jsd(logits_NV: Tensor, target: ChunkTarget, beta: float = 0.5) -> Tensor:
    """Return the generalised Jensen-Shannon divergence: `β KL(p‖m) + (1 − β) KL(q‖m)` with `m = β p + (1 − β) q`.

    It is at most the entropy of (β, 1 − β); close to `β KL(p‖q)` for small β and to `(1 − β) KL(q‖p)` for β near 1.
    Source: Agarwal et al. 2024, "On-policy distillation of language models" (GKD).
    """
    outcomes = _outcomes(logits_NV, target)
    mixture_NO = _log_mixture(beta, outcomes.teacher_NO, outcomes.student_NO)
    return beta * _kl(outcomes.teacher_NO, mixture_NO) + (1 - beta) * _kl(outcomes.student_NO, mixture_NO)


def skewed_kl(logits_NV: Tensor, target: ChunkTarget, skew: float = 0.1) -> Tensor:
    """Return `KL(p ‖ λ p + (1 − λ) q)`, at most `−log λ`; forward KL for λ = 0. Source: Ko et al. 2024, "DistiLLM"."""
    outcomes = _outcomes(logits_NV, target)
    return _kl(outcomes.teacher_NO, _log_mixture(skew, outcomes.teacher_NO, outcomes.student_NO))


def skewed_reverse_kl(logits_NV: Tensor, target: ChunkTarget, skew: float = 0.1) -> Tensor:
    """Return `KL(q ‖ λ q + (1 − λ) p)`, at most `−log λ`; reverse KL for λ = 0. Source: Ko et al. 2024, "DistiLLM"."""
    outcomes = _outcomes(logits_NV, target)
    return _kl(outcomes.student_NO, _log_mixture(skew, outcomes.student_NO, outcomes.teacher_NO))


def adaptive_kl(logits_NV: Tensor, target: ChunkTarget, likely_mass: float = 0.5) -> Tensor:
    """Return `h KL(p‖q) + (1 − h) KL(q‖p)`: h is the share of `Σ |p − q|` that lies on the teacher's likely tokens.

    These are the most probable tokens as long as they have at most `likely_mass` together, and the first in any case
    (the paper's "head"). h is a constant to the gradient. "Any other token" (a rest) is never among them: its tokens
    are less probable than every entry, so if the likely tokens are among the entries, h differs from the exact one by
    the tail's shape alone. Source: Wu et al. 2024 (arXiv 2404.02657), "Rethinking Kullback-Leibler divergence in
    knowledge distillation for large language models" (AKL).
    """
    outcomes = _outcomes(logits_NV, target)
    likely_N = _share_of_likely(outcomes, likely_mass)
    forward_N = _kl(outcomes.teacher_NO, outcomes.student_NO)
    return likely_N * forward_N + (1 - likely_N) * _kl(outcomes.student_NO, outcomes.teacher_NO)


def total_variation(logits_NV: Tensor, target: ChunkTarget) -> Tensor:
    """Return `½ Σ |p − q|`, from 0 to 1. Source: Wen et al. 2023, "f-divergence minimization for sequence-level KD"."""
    outcomes = _outcomes(logits_NV, target)
    return 0.5 * (outcomes.teacher_NO.exp() - outcomes.student_NO.exp()).abs().sum(-1)


def mean_squared_logits(logits_NV: Tensor, target: ChunkTarget) -> Tensor:
    """Return the mean over the vocabulary of the squared difference of the logits, less each side's mean logit.

    A common shift of all logits changes no distribution, so it is not learned either. In this convention
    `T² KL(p_T‖q_T)` goes to half of this for T → ∞ (Hinton et al. 2015, §2.1), and a temperature with its T² changes
    nothing. It needs every token's logit. Source: Ba & Caruana 2014; Kim et al. 2021, "Comparing Kullback-Leibler
    divergence and mean squared error loss in knowledge distillation".
    """
    assert isinstance(target, DenseChunk), "the logits of all tokens are in exact targets alone (scheme hidden)"
    difference_NV = logits_NV - target.log_probs_NV().to(logits_NV.dtype)
    return (difference_NV - difference_NV.mean(dim=-1, keepdim=True)).square().mean(dim=-1)


def cross_entropy(logits_NV: Tensor, target: ChunkTarget) -> Tensor:
    """Return the negative log-probability of the true next token."""
    return torch.nn.functional.cross_entropy(logits_NV, target.true_ids_N, reduction="none")


@dataclass(frozen=True)
class _Outcomes:
    """Log-probabilities of the same outcomes, all finite."""

    teacher_NO: Tensor
    student_NO: Tensor
    has_rest: bool
    """True if the last outcome is "any other token"."""


def _outcomes(logits_NV: Tensor, target: ChunkTarget) -> _Outcomes:
    if isinstance(target, DenseChunk):
        teacher_NV = target.log_probs_NV().to(logits_NV.dtype)
        return _Outcomes(teacher_NV, torch.log_softmax(logits_NV, dim=-1), has_rest=False)
    assert target.rest_N is not None, "a sparse sample has no outcomes: use targets with a rest, or exact ones"
    weights_NK, vocab_size = target.weights_NK.detach(), logits_NV.shape[1]
    is_entry_NK = weights_NK > 0
    # A place without an entry marks a token beyond the vocabulary: its id, 0, may be in the rest or be an entry's.
    marked_NV = torch.zeros(len(logits_NV), vocab_size + 1, dtype=torch.bool, device=logits_NV.device)
    marked_NV = marked_NV.scatter(1, torch.where(is_entry_NK, target.ids_NK, vocab_size), True)[:, :-1]
    is_rest_N = ~marked_NV.all(-1)

    total_N = torch.logsumexp(logits_NV, dim=-1)
    entries_NK = logits_NV.gather(1, target.ids_NK) - total_N[:, None]
    # The rest is summed over its own tokens, because 1 − Σ q_k loses all its digits when the student is sure.
    rest_N = logits_NV.masked_fill(marked_NV & is_rest_N[:, None], -torch.inf).logsumexp(dim=-1) - total_N
    # The teacher's rest, 1 less the entries' sum, is known to this precision only, and 0 would make the reverse KL
    # infinite.
    least = torch.finfo(weights_NK.dtype).eps
    teacher_NO = torch.cat([weights_NK, target.rest_N.detach().clamp(min=least)[:, None]], dim=1).log()
    student_NO = torch.cat([entries_NK, rest_N[:, None]], dim=1)
    is_outcome_NO = torch.cat([is_entry_NK, is_rest_N[:, None]], dim=1)
    return _Outcomes(
        torch.where(is_outcome_NO, teacher_NO.to(logits_NV.dtype), _NOWHERE),
        torch.where(is_outcome_NO, student_NO, _NOWHERE),
        has_rest=True,
    )


def _kl(first_NO: Tensor, second_NO: Tensor) -> Tensor:
    """Return KL(first‖second) of log-probabilities."""
    return (first_NO.exp() * (first_NO - second_NO)).sum(-1)


def _log_mixture(share: float, first_NO: Tensor, second_NO: Tensor) -> Tensor:
    """Return `log(share · first + (1 − share) · second)` of log-probabilities, for a share in [0, 1)."""
    if share == 0:
        return second_NO
    return torch.logaddexp(first_NO + math.log(share), second_NO + math.log1p(-share))


@torch.no_grad()
def _share_of_likely(outcomes: _Outcomes, likely_mass: float) -> Tensor:
    """Return the share of `Σ |p − q|` on the teacher's most probable tokens; one half where p and q are the same."""
    teacher_NO, student_NO = outcomes.teacher_NO.exp(), outcomes.student_NO.exp()
    tokens = teacher_NO.shape[1] - outcomes.has_rest
    width = 64
    while True:  # a few tokens nearly always have the mass: sorting the vocabulary would take longer than all the rest
        width = min(width, tokens)
        top_NW, places_NW = teacher_NO[:, :tokens].topk(width, dim=-1)
        mass_NW = top_NW.cumsum(-1)
        if width == tokens or bool((mass_NW[:, -1] > likely_mass).all()):
            break
        width *= 8
    is_likely_NW = mass_NW <= likely_mass
    is_likely_NW[:, 0] = True
    likely_N = ((top_NW - student_NO.gather(1, places_NW)).abs() * is_likely_NW).sum(-1)
    gap_N = (teacher_NO - student_NO).abs().sum(-1)
    least = torch.finfo(gap_N.dtype).tiny
    return ((likely_N + least) / (gap_N + 2 * least)).clamp(max=1)
