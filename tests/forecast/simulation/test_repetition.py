"""What is alike and simulated once, or twice, leaves peak and work as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

from distill import memory
from distill.forecast.phases.evaluation import simulate_fidelity, simulate_likelihood
from distill.forecast.phases.step import StepShape, simulate_step
from distill.forecast.phases.teacher import simulate_teacher
from distill.forecast.simulation.repetition import each_kind_of_chunk_once, moments_made_first, work_of_update
from distill.forecast.simulation.result import Simulation
from distill.targets import schemes
from distill.training.optimizers import chunked_adamw
from students.compact import CompactDecoder

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


TEXT: dict[str, Any] = {"batch_size": 5, "length": 50, "vocab_size": 96, "documents": 2}
SCHEMES = {
    "varopt": schemes.make("varopt", threshold=0.1),
    "top_k": schemes.make("top_k", entries=8),
    "hidden": schemes.make("hidden", size=64),
}


def teacher() -> Any:
    return CompactDecoder(96, 64, 2, 4)


@pytest.mark.parametrize(
    "simulate",
    [
        *(partial(simulate_teacher, teacher, scheme=scheme, chunk_size=16) for scheme in SCHEMES.values()),
        partial(simulate_likelihood, teacher, chunk_size=16),  # 250 positions: 15 chunks, and a smaller one
        partial(simulate_fidelity, teacher, teacher_hidden_size=32, teacher_dtype=torch.bfloat16, chunk_size=16),
    ],
    ids=[*SCHEMES, "likelihood", "fidelity"],
)
def test_two_samples_or_chunks_stand_for_all(simulate: Callable[..., Simulation]) -> None:
    two = simulate(device="cuda", **TEXT)
    everything = {"first_two_alike": lambda items, *_: counted(items)}
    met = 0

    def counted(items: Any) -> Any:
        nonlocal met
        for item in items:
            met += 1
            yield item

    with mock.patch.multiple(memory.teacher, **everything), mock.patch.multiple(memory.evaluation, **everything):
        whole = simulate(device="cuda", **TEXT)
    assert met in (5, 16)
    assert two == whole
