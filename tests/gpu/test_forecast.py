"""The forecast for a CUDA device against its allocator's own counter: within 5 percent, with every lever."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from distill.cache.making.predict import TeacherModule
from distill.forecast.phases.step import StepShape, make_batch, run_steps, simulate_step
from distill.forecast.phases.teacher import make_batch as make_teacher_batch
from distill.forecast.phases.teacher import simulate_teacher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here"),
]

SHAPE = StepShape(samples=8, length=512)
"""More than a CPU's: the device's own overhead is not what is forecast."""
LEVERS: dict[str, dict[str, Any]] = {
    "none": {},
    "checkpointing": {"checkpointing": True},
    "accumulation": {"accumulate": 4},
    "float32": {"precision": "32-true"},
    "float16": {"precision": "16-mixed"},
    "8 bits": {"optimizer": "adamw_8bit", "checkpointing": True},
    "paged": {"optimizer": "paged_adamw_8bit", "checkpointing": True},
    "offloaded": {"offload": True, "checkpointing": True},
    "packed": {"documents": 2},
}


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """tests/benchmarks/forecast_accuracy.py, whose students these are."""
    return importlib.import_module("forecast_accuracy")


@pytest.mark.parametrize("lever", LEVERS)
@pytest.mark.parametrize("student", ["llama", "gpt2", "compact", "lora", "lora on nf4"])
def test_a_step_takes_what_was_forecast(benchmark: Any, student: str, lever: str) -> None:
    changes = dict(LEVERS[lever])
    shape = replace(SHAPE, documents=changes.pop("documents", 1))
    if student == "gpt2":
        shape = replace(shape, length=256)  # all that it reads
    levers = replace(benchmark.Levers(), device_type="cuda", **changes)

    def make_module() -> Any:
        return benchmark.make_module(student, levers, samples=shape.samples)

    forecast = simulate_step(make_module, shape, precision=levers.precision, device="cuda").peak_bytes
    batch = make_batch(shape, benchmark.VOCABULARY)

    def run() -> None:
        run_steps(make_module(), batch, levers.precision, accelerator="cuda")

    measured = benchmark.allocator_peak(lambda: run, "cuda")
    assert forecast == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_teacher_takes_what_was_forecast(benchmark: Any, quantization: str) -> None:
    sizes = {"batch_size": 8, "length": 512}
    forecast = simulate_teacher(
        lambda: benchmark.teacher(quantization),
        **sizes,
        vocab_size=benchmark.TEACHER_VOCABULARY,
        scheme=benchmark.SCHEME,
        device="cuda",
    ).peak_bytes

    def run() -> None:
        module = TeacherModule(
            benchmark.teacher(quantization).to("cuda"), benchmark.TEACHER_VOCABULARY, benchmark.SCHEME, seed=0
        )
        batch = make_teacher_batch(**sizes, vocab_size=benchmark.TEACHER_VOCABULARY)
        module.predict_step({name: tensor.to("cuda") for name, tensor in batch.items()}, 0)

    assert forecast == pytest.approx(benchmark.allocator_peak(lambda: run, "cuda"), rel=0.05)


def test_a_limit_is_kept_by_the_allocator() -> None:
    """A card of this size gives so much memory, and no more. The limit stays, so this is a separate process."""
    code = """
import torch
from distill.forecast import preflight
from distill.forecast.forecast import CONTEXT_BYTES, DRIVER_BYTES

preflight._hold_to(4 << 30, torch.device("cuda", 0))
left = (4 << 30) - CONTEXT_BYTES - DRIVER_BYTES
torch.empty(left - (64 << 20), dtype=torch.uint8, device="cuda")
torch.cuda.empty_cache()
try:
    torch.empty(left + (64 << 20), dtype=torch.uint8, device="cuda")
except torch.cuda.OutOfMemoryError:
    print("kept")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "kept\n", done.stderr
