"""A tiny student in plain PyTorch, its module, and the same step on real tensors under the tracker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from distill.forecast.phases.step import StepShape, make_batch, run_tracked
from distill.forecast.simulation.result import Simulation
from distill.forecast.simulation.tracker import Tracker
from distill.losses.objective import Mixture
from distill.training.activation_checkpointing import checkpoint_blocks
from distill.training.module import DistillationModule
from distill.training.optimizers.adamw import make_optimizer
from distill.training.optimizers.schedule import Schedule
from distill.training.optimizers.step_in_backward import StepInBackward
from students.compact import CompactDecoder

VOCABULARY = 96


def compact() -> nn.Module:
    return CompactDecoder(VOCABULARY, 64, 2, 4)


@pytest.fixture(scope="session")
def maker() -> Callable[..., Callable[[], DistillationModule]]:
    """`maker(checkpointing=1)()` is a module with every block recomputed, 2 every second one."""

    def with_levers(
        student: Callable[[], Any] = compact,
        *,
        checkpointing: int = 0,
        micro_batch: int = 4,
        chunk_size: int = 128,
        optimizer: str = "adamw",
        rounding: Any = "nearest",
        step_in_backward: bool = False,
        vocab_size: int = VOCABULARY,
        device_type: str | None = None,
        is_scaled: bool = False,
        **options: Any,
    ) -> Callable[[], DistillationModule]:
        def make_module() -> DistillationModule:
            torch.manual_seed(0)
            model = student()
            if checkpointing:
                checkpoint_blocks(model, checkpointing)
            if rounding != "nearest":
                model.to(torch.bfloat16)
            return DistillationModule(
                model,
                vocab_size=vocab_size,
                chunk_size=chunk_size,
                micro_batch=micro_batch,
                make_optimizer=optimizer_of,
                make_schedule=lambda total: Schedule("cosine", total, 0.0, 0.2, 0.1),
                gradient_clip=0.0 if step_in_backward else 1.0,
                **{"objective": Mixture(0.3), **options},
            )

        def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
            settings: dict[str, Any] = {"learning_rate": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}
            kind: dict[str, Any] = {"name": optimizer, "rounding": rounding, "device_type": device_type}
            made = make_optimizer(module, **kind, is_scaled=is_scaled, **settings)
            return StepInBackward(made, module) if step_in_backward else made

        return make_module

    return with_levers


@pytest.fixture
def real_step(one_thread: None) -> Callable[..., Simulation]:
    """The same step on real tensors, under the tracker."""

    def run(make_module: Callable[[], DistillationModule], shape: StepShape, precision: str) -> Simulation:
        batch, tracker = make_batch(shape, VOCABULARY), Tracker("cpu")
        with tracker:
            return run_tracked(make_module, batch, tracker, precision)

    return run
