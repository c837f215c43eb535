"""Repetitions that are simulated once or twice leave peak and work unchanged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

from distill.forecast.phases import evaluation, teacher
from distill.forecast.phases.evaluation import simulate_fidelity, simulate_likelihood
from distill.forecast.phases.step import StepShape, simulate_step
from distill.forecast.phases.teacher import simulate_teacher
from distill.forecast.simulation.result import Simulation
from distill.targets import schemes
from distill.training.optimizers import chunked_adamw
from students.compact import CompactDecoder

SHAPE = StepShape(samples=4, length=16, entries=5)


@pytest.mark.parametrize(
    "levers",
    [
        {},
        {"micro_batch": 1},
        {"optimizer": "adamw_8bit"},
        {"rounding": "stochastic"},
        {"optimizer": "adamw_8bit", "checkpointing": True},
        {"optimizer": "adamw_8bit", "step_in_backward": True},
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_step_with_moments_and_alike_chunks_once_is_the_second_of_two(
    maker: Callable[..., Any], levers: dict[str, Any], device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda" and "checkpointing" in levers:
        pytest.skip("a compact student's norms on CUDA are not simulated in what is recomputed")
    monkeypatch.setattr(chunked_adamw, "CHUNK", 1024)
    precision = "bf16-true" if "rounding" in levers else "32-true"
    simulate = partial(simulate_step, maker(**levers), SHAPE, precision=precision, device=device)
    one, two = simulate(), simulate(shortcuts=False)
    assert one.peak_bytes == pytest.approx(two.peak_bytes, abs=1024)  # a scalar outlives the first step
    assert one.parts == pytest.approx(two.parts, abs=1024)
    assert one.work == two.work


def test_the_updates_own_work_does_not_grow_with_the_passes(maker: Callable[..., Any]) -> None:
    found = []
    for micro_batch in (4, 1):
        whole = simulate_step(maker(micro_batch=micro_batch), SHAPE)
        assert sum(whole.update.values()) < sum(whole.work.values())
        found.append(sum(work.bytes * count for work, count in whole.update.items()))
    assert found[0] == found[1] > 0


def test_clipping_belongs_to_the_update(maker: Callable[..., Any]) -> None:
    """Else a forecast of more passes than are simulated would clip in each of them."""

    def unclipped() -> Any:
        module = maker()()
        module.gradient_clip = 0.0
        return module

    clipped, plain = simulate_step(maker(), SHAPE), simulate_step(unclipped, SHAPE)
    assert clipped.work - clipped.update == plain.work - plain.update
    assert sum(clipped.update.values()) > sum(plain.update.values())


def test_the_tensors_an_optimizer_keeps_are_its_own(maker: Callable[..., Any], real_step: Callable[..., Any]) -> None:
    """A real step after a simulated one finds nothing fake."""
    make = maker(optimizer="adamw_8bit")
    simulated = simulate_step(make, SHAPE)
    assert real_step(make, SHAPE, "32-true").parts["optimizer states"] == simulated.parts["optimizer states"]


TEXT: dict[str, Any] = {"batch_size": 5, "length": 50, "vocab_size": 96, "documents": 2}
SCHEMES = {
    "varopt": schemes.make("varopt", threshold=0.1),
    "top_k": schemes.make("top_k", entries=8),
    "hidden": schemes.make("hidden", size=64),
}


def model() -> Any:
    return CompactDecoder(96, 64, 2, 4)


@pytest.mark.parametrize(
    "simulate",
    [
        *(partial(simulate_teacher, model, scheme=scheme, chunk_size=16) for scheme in SCHEMES.values()),
        partial(simulate_likelihood, model, chunk_size=16),  # 250 positions: 15 chunks, and a smaller one
        partial(simulate_fidelity, model, teacher_hidden_size=32, teacher_dtype=torch.bfloat16, chunk_size=16),
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

    with mock.patch.multiple(teacher, **everything), mock.patch.multiple(evaluation, **everything):
        whole = simulate(device="cuda", **TEXT)
    assert met in (5, 16)
    assert two == whole
