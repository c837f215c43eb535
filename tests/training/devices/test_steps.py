"""Two gloo processes make the very steps of one: however a step is cut, packed or not, with whole weights or shares."""

from __future__ import annotations

import os
from typing import Any

import pytest

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks"),
]


MATRIX = [f"{packing} {micro_batch}" for packing in ("packed", "unpacked") for micro_batch in (1, 2, 4, 8)]


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp"])
@pytest.mark.parametrize("name", MATRIX)
def test_a_step_is_the_same_however_it_is_cut(
    one: Any, request: Any, strategy: str, name: str, check_same: Any, in_one_pass: Any
) -> None:
    """Against one process with all samples of a step in one pass."""
    expected = in_one_pass(name.startswith("packed"))
    assert [len(expected[key]) for key in ("loss", "gradient")] == [4, 3]  # one step has no position
    assert expected["gradient"][0].norm() > 0.01
    found = [one[name]] if strategy == "auto" else request.getfixturevalue("both")(strategy, name)
    for process in found:
        check_same(process, expected)


def test_packing_makes_a_difference(one: Any) -> None:
    """Else the two halves of the matrix would be one."""
    gap = one["packed 4"]["gradient"][0] - one["unpacked 4"]["gradient"][0]
    assert gap.norm() > 0.01 * one["packed 4"]["gradient"][0].norm()
