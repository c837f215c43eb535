"""A cache's held-out samples come from all held-out documents; a cache begun by an earlier release keeps its order."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from distill.cache.format.manifest import Manifest, differences
from distill.experiment.cache import HELD_OUT_ORDER, as_begun, sample_numbers

SAMPLES: Any = SimpleNamespace(held_out=range(1000), train=range(5000))


def manifest(held_out: int, **fingerprints: str) -> Manifest:
    return Manifest(
        scheme="varopt",
        scheme_parameters={"threshold": 0.02},
        temperature=1.0,
        seed=0,
        vocab_size=100,
        sequence_length=16,
        pack=True,
        shard_samples=8,
        splits={"held_out": held_out, "train": 40},
        fingerprints={"corpus": "of", **fingerprints},
        made_with={},
    )


def test_held_out_samples_are_spread_over_the_whole_text() -> None:
    found = sample_numbers(manifest(16, **{HELD_OUT_ORDER: "spread"}), SAMPLES)
    assert len(set(found["held_out"])) == 16 and np.diff([0, *sorted(found["held_out"]), 1000]).max() <= 130
    assert found["train"] == range(40)


def test_a_larger_cache_begins_with_the_samples_of_a_smaller_one() -> None:
    small, large = (
        sample_numbers(manifest(size, **{HELD_OUT_ORDER: "spread"}), SAMPLES)["held_out"] for size in (16, 100)
    )
    assert [*large][:16] == [*small]
    everything = sample_numbers(manifest(1000, **{HELD_OUT_ORDER: "spread"}), SAMPLES)["held_out"]
    assert sorted(everything) == list(range(1000))


def test_a_cache_begun_by_an_earlier_release_goes_on_in_its_own_order() -> None:
    earlier, now = manifest(16), manifest(16, **{HELD_OUT_ORDER: "spread"})
    assert differences(now, earlier), "the two orders are never mixed"
    continued = as_begun(now, earlier)
    assert not differences(continued, earlier) and continued.identity == earlier.identity
    assert sample_numbers(continued, SAMPLES)["held_out"] == range(16)
    assert as_begun(now, now) == now
    assert differences(as_begun(replace(now, seed=1), earlier), earlier)
