"""Schemes: found by name, and what they store gives their weights back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.targets import schemes

SPARSE: list[tuple[str, dict[str, Any]]] = [
    ("varopt", {"threshold": 0.02}),
    ("varopt", {"threshold": 0.3, "draws": 3}),
    ("varopt", {"threshold": 1.0}),
    ("top_k", {"entries": 1}),
    ("top_k", {"entries": 40}),
    ("top_k", {"entries": 5000}),
    ("random", {"entries": 50}),
    ("random", {"entries": 50, "exponent": 0.7}),
]


def uniforms(rows: int, scheme: schemes.AnyScheme) -> np.ndarray:
    return np.random.default_rng(0).random((rows, scheme.uniforms))


@pytest.mark.parametrize(("name", "parameters"), [*SPARSE, ("hidden", {"size": 64})])
def test_a_manifest_gives_the_scheme_back(name: str, parameters: dict[str, Any]) -> None:
    scheme = schemes.make(name, **parameters)
    written = json.loads(json.dumps(schemes.parameters(scheme)))
    assert schemes.make(name, **written) == scheme
    assert parameters.items() <= written.items() and scheme.name == name


@pytest.mark.parametrize(("name", "parameters"), SPARSE)
def test_what_is_stored_gives_the_weights_back(
    random_rows: Tensor, zipf_rows: Tensor, name: str, parameters: dict[str, Any]
) -> None:
    scheme: Any = schemes.make(name, **parameters)
    uniform = torch.full((1, 1009), 1 / 1009)
    sure = torch.zeros(1, 1009).index_fill_(1, torch.tensor([5]), 1)
    probs_NV = torch.cat([random_rows, zipf_rows, uniform, sure])
    uniform_NU = uniforms(len(probs_NV), scheme)
    first, *further = scheme.sample(probs_NV, torch.from_numpy(uniform_NU))
    assert len(further) == scheme.draws - 1
    heads_N, counts_N = first.heads_N.numpy(), first.counts_N.numpy()
    weights_NK = first.weights_NK.double().numpy()
    with np.errstate(all="raise", under="ignore"):
        codes_C = scheme.encode(weights_NK, heads_N, counts_N - heads_N, uniform_NU)
        decoded_NK, rest_N = scheme.decode(codes_C, heads_N, counts_N - heads_N)
    assert codes_C.dtype == np.uint16
    assert decoded_NK.shape == weights_NK.shape
    np.testing.assert_allclose(decoded_NK, weights_NK, atol=0.0201)
    assert decoded_NK.min() >= -1e-15
    assert not decoded_NK[np.arange(decoded_NK.shape[1]) >= counts_N[:, None]].any()
    assert (rest_N is None) == (first.rest_N is None)
    if rest_N is not None:
        np.testing.assert_allclose(rest_N, first.rest_N.numpy(), rtol=0.0201, atol=1e-6)
    sums_N = decoded_NK.sum(axis=1) + (0 if rest_N is None else rest_N)
    np.testing.assert_allclose(sums_N, 1, atol=1e-12)


def test_shares_of_draws_are_stored_exactly(random_rows: Tensor) -> None:
    scheme: Any = schemes.make("random", entries=50)
    uniform_NU = uniforms(12, scheme)
    (targets,) = scheme.sample(random_rows, torch.from_numpy(uniform_NU))
    heads_N, weights_NK = targets.heads_N.numpy(), targets.weights_NK.double().numpy()
    codes_C = scheme.encode(weights_NK, heads_N, 0 * heads_N, uniform_NU)
    decoded_NK, _ = scheme.decode(codes_C, heads_N, 0 * heads_N)
    np.testing.assert_allclose(decoded_NK, weights_NK, rtol=1e-7)
    assert np.array_equal(decoded_NK.sum(axis=1), np.ones(12))


def test_draws_share_their_heads_and_are_independent(random_rows: Tensor) -> None:
    scheme: Any = schemes.make("varopt", threshold=0.02, draws=4)
    draws = scheme.sample(random_rows, torch.from_numpy(uniforms(12, scheme)))
    for draw in draws[1:]:
        assert torch.equal(draw.weights_NK, draws[0].weights_NK)
        assert torch.equal(draw.heads_N, draws[0].heads_N) and torch.equal(draw.counts_N, draws[0].counts_N)
        is_head_NK = torch.arange(draw.ids_NK.shape[1]) < draw.heads_N[:, None]
        assert torch.equal(draw.ids_NK[is_head_NK], draws[0].ids_NK[is_head_NK])
        assert (draw.ids_NK != draws[0].ids_NK).sum() > 100


def test_codes_of_heads_use_other_numbers_than_the_atoms(random_rows: Tensor) -> None:
    """Otherwise the rounding of weights would go with the choice of ids."""
    scheme: Any = schemes.make("varopt", threshold=0.02)
    uniform_NU = uniforms(12, scheme)
    (targets,) = scheme.sample(random_rows, torch.from_numpy(uniform_NU))
    heads_N, atoms_N = targets.heads_N.numpy(), (targets.counts_N - targets.heads_N).numpy()
    weights_NK = targets.weights_NK.double().numpy()
    codes_C = scheme.encode(weights_NK, heads_N, atoms_N, uniform_NU)
    uniform_NU[:, 0] = 0.999
    assert np.array_equal(scheme.encode(weights_NK, heads_N, atoms_N, uniform_NU), codes_C)
    uniform_NU[:, 1:] = 0.999
    assert not np.array_equal(scheme.encode(weights_NK, heads_N, atoms_N, uniform_NU), codes_C)


def test_most_heads_find_a_number_for_each_code() -> None:
    """1 / threshold equal heads and the tail's atom: the widest row there is."""
    for threshold in (0.3, 0.1, 0.02, 0.0041):
        scheme: Any = schemes.make("varopt", threshold=threshold)
        heads = int(0.99 / threshold)
        probs_NV = torch.full((1, heads + 1), threshold)
        probs_NV[0, -1] = 1 - heads * threshold
        (targets,) = scheme.sample(probs_NV, torch.full((1, scheme.uniforms), 0.5).double())
        assert int(targets.counts_N) <= scheme.uniforms - scheme.draws
