"""Schemes: found by name, given back by a manifest, never more entries or numbers than they say."""

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
    ("varopt", {"threshold": 0.3}),
    ("varopt", {"threshold": 1.0}),
    ("top_k", {"entries": 1}),
    ("top_k", {"entries": 40}),
    ("top_k", {"entries": 5000}),
    ("random", {"entries": 50}),
]


@pytest.mark.parametrize(("name", "parameters"), [*SPARSE, ("hidden", {"size": 64})])
def test_a_manifest_gives_the_scheme_back(name: str, parameters: dict[str, Any]) -> None:
    scheme = schemes.make(name, **parameters)
    written = json.loads(json.dumps(schemes.parameters(scheme)))
    assert schemes.make(name, **written) == scheme
    assert parameters.items() <= written.items() and scheme.name == name


@pytest.mark.parametrize(("name", "parameters"), SPARSE)
def test_no_position_has_more_entries_than_the_bound(
    random_rows: Tensor, zipf_rows: Tensor, name: str, parameters: dict[str, Any]
) -> None:
    scheme: Any = schemes.make(name, **parameters)
    probs_NV = torch.cat([random_rows, zipf_rows, torch.full((1, 1009), 1 / 1009)])
    uniform_NU = torch.from_numpy(np.random.default_rng(0).random((len(probs_NV), scheme.uniforms)))
    targets = scheme.sample(probs_NV, uniform_NU)
    assert 1 <= int(targets.counts_N.max()) <= scheme.most_entries


def test_most_exact_entries_find_a_number_for_each_code() -> None:
    """1 / threshold equal probabilities and the tail's atom: the widest row there is."""
    for threshold in (0.3, 0.1, 0.02, 0.0041):
        scheme: Any = schemes.make("varopt", threshold=threshold)
        exact = int(0.99 / threshold)
        probs_NV = torch.full((1, exact + 1), threshold)
        probs_NV[0, -1] = 1 - exact * threshold
        targets = scheme.sample(probs_NV, torch.full((1, scheme.uniforms), 0.5).double())
        assert int(targets.counts_N) <= scheme.most_entries == scheme.uniforms - 1
