"""An optimiser's equal chunks, simulated once, leave peak and work as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from distill.memory.repetition import each_kind_of_chunk_once, moments_made_first, work_of_update
from distill.memory.step import StepShape, simulate_step
from distill.training.optimizers import chunked_adamw

SHAPE = StepShape(samples=4, length=16, entries=5)


@pytest.mark.parametrize(
    "levers",
    [{"optimizer": "adamw_8bit"}, {"rounding": "stochastic"}, {"optimizer": "adamw_8bit", "step_in_backward": True}],
)
def test_chunks_seen_once_count_in_full(maker: Callable[..., Any], levers: dict[str, Any]) -> None:
    precision = "bf16-true" if "rounding" in levers else "32-true"
    with mock.patch.object(chunked_adamw, "CHUNK", 1024):
        whole = simulate_step(maker(**levers), SHAPE, precision=precision)
        with each_kind_of_chunk_once():
            once = simulate_step(maker(**levers), SHAPE, precision=precision)
    assert once.peak_bytes == whole.peak_bytes
    assert once.work == whole.work


@pytest.mark.parametrize(
    "levers", [{}, {"micro_batch": 1}, {"optimizer": "adamw_8bit", "checkpointing": True}, {"step_in_backward": True}]
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_step_with_moments_is_the_second_of_two(
    maker: Callable[..., Any], levers: dict[str, Any], device: Any
) -> None:
    if device == "cuda" and "checkpointing" in levers:
        pytest.skip("a compact student's norms on CUDA are not simulated in what is recomputed")
    two = simulate_step(maker(**levers), SHAPE, device=device)
    with moments_made_first():
        one = simulate_step(maker(**levers), SHAPE, device=device)
    assert one.peak_bytes == pytest.approx(two.peak_bytes, abs=1024)  # a scalar outlives the first step
    assert one.parts == pytest.approx(two.parts, abs=1024)
    assert one.work == two.work


def test_the_updates_own_work_does_not_grow_with_the_passes(maker: Callable[..., Any]) -> None:
    found = []
    for micro_batch in (4, 1):
        with work_of_update() as update:
            whole = simulate_step(maker(micro_batch=micro_batch), SHAPE)
        assert sum(update.values()) < sum(whole.work.values())
        found.append(sum(work.bytes * count for work, count in update.items()))
    assert found[0] == found[1] > 0
