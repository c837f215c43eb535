"""The choice of tokens: the distribution that transformers' own filters leave, drawn by one uniform number a text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from distill.errors import UserError
from distill.generation.sampling import Sampling, choose, uniforms

pytestmark = pytest.mark.usefixtures("one_thread")
DRAWS = 801


def filtered(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities that transformers samples from."""
    steps: list[Any] = [theirs.TemperatureLogitsWarper(sampling.temperature)]
    steps += [theirs.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    steps += [theirs.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    steps += [theirs.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    for step in steps:
        logits_BV = step(torch.empty(0), logits_BV)
    return logits_BV.softmax(-1)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(top_k=5),
        Sampling(top_p=0.6),
        Sampling(top_p=0.999),  # more tokens than the short list has
        Sampling(min_p=0.1),
        Sampling(temperature=1.5, top_k=40, top_p=0.8, min_p=0.02),
    ],
    ids=str,
)
def test_uniform_numbers_draw_each_token_as_often_as_its_probability(random_rows: Tensor, sampling: Sampling) -> None:
    """Evenly spaced numbers stand for all: a token's share of them differs from its probability by one draw at most."""
    evenly = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    for row_V, expected_V in zip(random_rows[::3].log(), filtered(random_rows[::3].log(), sampling), strict=True):
        drawn = choose(row_V.expand(DRAWS, -1), evenly, sampling)
        share_V = drawn.bincount(minlength=len(row_V)) / DRAWS
        assert float((share_V - expected_V).abs().max()) <= 1.01 / DRAWS


def test_the_ends_of_the_range_draw_possible_tokens() -> None:
    logits_BV = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).clamp(min=-1e30).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert choose(logits_BV, ends, Sampling()).tolist() == [1, 2]
    assert choose(logits_BV, ends, Sampling(top_p=0.9)).tolist() == [1, 2]


def test_a_text_draws_the_same_beside_any_others(random_rows: Tensor) -> None:
    sampling = Sampling(top_p=0.95)
    draws = uniforms(3, list(range(12)), [0] * 12, position=5)
    together = choose(random_rows.log(), draws, sampling)
    alone = [int(choose(random_rows[[row]].log(), draws[[row]], sampling)) for row in range(12)]
    assert together.tolist() == alone
    assert choose(random_rows.log(), draws, Sampling(temperature=0)).tolist() == random_rows.argmax(-1).tolist()


def test_uniform_numbers_differ_in_every_argument_and_are_uniform() -> None:
    many = torch.cat(
        [
            uniforms(seed, range(50), [sample] * 50, position)
            for seed in (0, 1, 2**63)
            for sample in (0, 1)
            for position in range(20)
        ]
    )
    assert len(many.unique()) == len(many) == 6000
    assert float(many.min()) >= 0 and float(many.max()) < 1
    assert float((many.sort().values - (torch.arange(6000) + 0.5) / 6000).abs().max()) < 0.025  # Kolmogorov–Smirnov
    assert float(torch.corrcoef(torch.stack([many[:-1], many[1:]]))[0, 1].abs()) < 0.05


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UserError, match="not finite"):
        choose(torch.tensor([[0.0, torch.nan]]), torch.tensor([0.5]), Sampling())
