"""Two gloo processes train as one does: over epochs, with features, without blocks, and where one has no room."""

from __future__ import annotations

import os
from typing import Any

import pytest

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks"),
]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["curve", "features", "no blocks", "auxiliary", "not finite"])
def test_two_processes_train_as_one_does(one: Any, both: Any, strategy: str, name: str, check_same: Any) -> None:
    """Several epochs with clipping; features; a student in one piece; an auxiliary loss; a step both leave out."""
    for process in both(strategy, name):
        check_same(process, one[name])


def test_these_cases_are_what_they_say(one: Any) -> None:
    assert len(one["curve"]["loss"]) == 12 and max(one["curve"]["norm"]) > 0.2
    assert one["curve"]["loss"][-4] < one["curve"]["loss"][0] - 0.05
    assert len(one["not finite"]["gradient"]) == 2
    assert (one["auxiliary"]["gradient"][0] - one["no blocks"]["gradient"][0]).norm() > 0.1


def test_a_device_that_runs_out_of_memory_makes_smaller_passes_and_the_same_training(
    one: Any, both: Any, check_same: Any
) -> None:
    first, second = both("ddp", "narrow")
    assert first["micro_batch"] == [4] * 8 and second["micro_batch"] == [4] * 2 + [2] * 6
    for process in (first, second):
        check_same(process, one["narrow"], tolerance=1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_dropout_differs_between_devices_and_rounding_does_not(both: Any, strategy: str) -> None:
    """And both do between steps."""
    first, second = both(strategy, "curve")
    drawn = [*first["seed of passes"], *second["seed of passes"]]
    assert len(set(drawn)) == len(drawn) > 9, "nine steps, and one process has nothing in some of them"
    assert first["seed of rounding"] == second["seed of rounding"]
    assert len(set(first["seed of rounding"])) == len(first["seed of rounding"]) == 9
