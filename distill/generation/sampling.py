"""The choice of the next token of many texts at once, by one uniform number each.

Shapes: B texts written together, V vocabulary, C candidates of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill.errors import UserError

SHORTLIST = 256
"""Likeliest tokens in which `top_p` is looked for first. Sorting the whole vocabulary takes far longer."""
_GOLDEN, _FIRST, _SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from, and the seed of the draws."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    seed: int = 0


def uniforms(seed: int, prompts_B: Sequence[int], samples_B: Sequence[int], position: int) -> Tensor:
    """Return float64 `[B]` in [0, 1): a function of the seed, the prompt, the sample of it, and the position alone.

    So neither the other texts of a batch nor a restart change a draw. It is SplitMix64 (Steele et al. 2014), applied
    to each of the four numbers in turn.
    """
    state_B: np.ndarray = np.full(len(prompts_B), seed, dtype=np.uint64)
    with np.errstate(over="ignore"):  # the arithmetic is modulo 2^64
        for numbers in (prompts_B, samples_B, np.full(len(prompts_B), position)):
            state_B = _mixed(state_B) ^ np.asarray(numbers, dtype=np.uint64)
        state_B = _mixed(state_B)
    return torch.from_numpy((state_B >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _mixed(state_B: np.ndarray) -> np.ndarray:
    state_B = state_B + _GOLDEN
    state_B = (state_B ^ (state_B >> np.uint64(30))) * _FIRST
    state_B = (state_B ^ (state_B >> np.uint64(27))) * _SECOND
    return state_B ^ (state_B >> np.uint64(31))


def choose(logits_BV: Tensor, uniforms_B: Tensor, sampling: Sampling) -> Tensor:
    """Return the next token of each text, int64 `[B]` on the CPU: the likeliest at temperature 0, else a drawn one.

    A draw is the inverse of the cumulative distribution at the text's uniform number. The distribution is
    `softmax(logits / temperature)`, cut to the `top_k` likeliest tokens, then to the fewest likeliest ones that have
    the probability `top_p` (of what is left), then to those with `min_p` of the likeliest one's probability. That is
    transformers' order. Raises UserError if a logit is not finite.
    """
    if not bool(logits_BV.isfinite().all()):
        raise UserError("the model's answer is not finite (its training diverged, or its weights are damaged)")
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).cpu()
    if logits_BV.device.type == "mps":  # which has no float64
        logits_BV = logits_BV.cpu()
    logits_BV = logits_BV.float()
    weights_BV = ((logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.temperature).exp()
    if sampling.top_k is None and sampling.top_p == 1:
        weights_BV[weights_BV < sampling.min_p] = 0
        return _drawn(weights_BV, uniforms_B).cpu()
    size = weights_BV.shape[-1]
    count = min(sampling.top_k or SHORTLIST, size)
    weights_BC, ids_BC = weights_BV.topk(count)
    whole_B = (weights_BC if sampling.top_k else weights_BV).sum(-1, dtype=torch.float64)
    enough_B = weights_BC.sum(-1, dtype=torch.float64) >= sampling.top_p * whole_B
    tokens_B = _among(weights_BC, ids_BC, whole_B, uniforms_B, sampling)
    open_rows = [] if sampling.top_k else (~enough_B).nonzero().flatten().tolist()
    for row in open_rows:  # each by itself, so that its tokens stand in the same order beside any other texts
        weights_1V, ids_1V = weights_BV[row : row + 1].topk(size)
        tokens_B[row : row + 1] = _among(
            weights_1V, ids_1V, whole_B[row : row + 1], uniforms_B[row : row + 1], sampling
        )
    return tokens_B.cpu()


def _among(weights_BC: Tensor, ids_BC: Tensor, whole_B: Tensor, uniforms_B: Tensor, sampling: Sampling) -> Tensor:
    """Draw among candidates that stand in falling order. `whole_B` is the weight that `top_p` is a share of."""
    before_BC = weights_BC.double().cumsum(-1) - weights_BC
    is_outside_BC = before_BC >= sampling.top_p * whole_B[:, None]  # the tokens before it reach top_p already
    is_outside_BC |= weights_BC < sampling.min_p * weights_BC[:, :1]
    kept_BC = weights_BC.masked_fill(is_outside_BC, 0) if sampling.top_p < 1 or sampling.min_p else weights_BC
    return ids_BC.gather(-1, _drawn(kept_BC, uniforms_B)[:, None])[:, 0]


def _drawn(weights_BC: Tensor, uniforms_B: Tensor) -> Tensor:
    """Return the place at which the cumulative weights pass the uniform number's share of their sum."""
    sums_BC = weights_BC.cumsum(-1, dtype=torch.float64)
    whole_B1 = sums_BC[:, -1:].contiguous()
    drawn_B1 = torch.searchsorted(sums_BC, uniforms_B.to(sums_BC.device)[:, None] * whole_B1, right=True)
    last_B1 = torch.searchsorted(sums_BC, whole_B1)  # a product may round up to the sum: the last one with weight then
    return torch.minimum(drawn_B1, last_B1)[:, 0]
