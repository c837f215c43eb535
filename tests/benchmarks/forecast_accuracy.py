"""Forecast against measured memory and time: `python tests/benchmarks/forecast_accuracy.py`.

Four kinds of students under several levers, and a teacher in bfloat16 and in 4 bits, are simulated without memory
(`distill.forecast`); then their steps are really made, in a process for each model. Measured are the bytes that torch's
CPU allocator held at most, from the profiler's record, and the processor's time of a step without the profiler, the
shortest of ten. The machine's speed is what `distill doctor --calibrate` measures, in the processor's time too and for
each model anew, for the speed of a virtual machine drifts.
On a CUDA device tests/gpu/test_forecast.py compares the same combinations with the allocator's own counter.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from paired import allocator_peak
from torch import nn

from distill.cache.making.predict import TeacherModule
from distill.forecast.machine.calibration import Efficiency, speed
from distill.forecast.machine.cards import this_machine
from distill.forecast.machine.measuring import calibrate
from distill.forecast.phases import teacher as teacher_phase
from distill.forecast.phases.step import StepShape, make_batch, run_steps, simulate_step
from distill.forecast.simulation.result import Simulation
from distill.losses.objective import Mixture
from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.quantization import quantize_linears
from distill.targets import schemes
from distill.training.activation_checkpointing import checkpoint_blocks
from distill.training.module import DistillationModule
from distill.training.offload import offload_activations
from distill.training.optimizers.adamw import make_optimizer
from distill.training.optimizers.schedule import Schedule
from students.compact import CompactDecoder
from students.huggingface import load_student
from students.lora import LoraLanguageModel, add_adapters

VOCABULARY = 16_384
STEP = StepShape(samples=4, length=128)
RUNS = 10
"""Runs of each batch and step. The shortest counts, as in a calibration."""
SCHEME = schemes.make("varopt", threshold=0.02)
TEACHER_BATCH = {"batch_size": 4, "length": 128}
TEACHER_VOCABULARY = 49_152


def _llama(**sizes: Any) -> Any:
    return transformers.LlamaConfig(num_attention_heads=8, num_key_value_heads=4, hidden_size=512, **sizes)


def llama() -> nn.Module:
    """60 M parameters."""
    config = _llama(vocab_size=2 * VOCABULARY, intermediate_size=1408, num_hidden_layers=9).to_dict()
    known = ("vocab_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return load_student(config={"model_type": "llama", "hidden_size": 512, **{key: config[key] for key in known}})


def gpt2() -> nn.Module:
    """21 M parameters, with dropout in its attention."""
    sizes = {"n_embd": 512, "n_layer": 4, "n_head": 8, "n_positions": 256}
    return load_student(config={"model_type": "gpt2", **sizes, "vocab_size": VOCABULARY})


def compact() -> nn.Module:
    """16 M parameters in plain PyTorch."""
    return CompactDecoder(VOCABULARY, 384, 6, 6)


def lora(quantization: str = "none") -> nn.Module:
    """Adapters on a frozen llama in bfloat16."""
    config = _llama(vocab_size=VOCABULARY, intermediate_size=1536, num_hidden_layers=6)
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if quantization == "nf4":
        quantize_linears(base, "nf4", torch.bfloat16, "cpu")
    add_adapters(base, "all-linear", 16, 32.0, 0.0)
    return LoraLanguageModel(base)


STUDENTS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "gpt2": gpt2,
    "compact": compact,
    "lora": lora,
    "lora on nf4": partial(lora, "nf4"),
}


def teacher(quantization: Any) -> nn.Module:
    """70 M parameters of SmolLM2's shapes, in bfloat16."""
    config = transformers.LlamaConfig(
        vocab_size=TEACHER_VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if quantization != "none":
        quantize_linears(model, quantization, torch.bfloat16, "cpu")
    return HuggingFaceLanguageModel(model).eval().requires_grad_(False)


TEACHERS = {"teacher bf16": "none", "teacher nf4": "nf4", "teacher int8": "int8"}


@dataclass(frozen=True)
class Levers:
    """Levers that are turned on."""

    checkpointing: bool = False
    accumulate: int = 1
    precision: str = "bf16-mixed"
    optimizer: str = "adamw"
    device_type: str | None = None
    offload: bool = False


LEVERS = {
    "none": Levers(),
    "checkpointing": Levers(checkpointing=True),
    "accumulation 4": Levers(accumulate=4),
    "32-true": Levers(precision="32-true"),
    "8 bits, checkpointing": Levers(optimizer="adamw_8bit", checkpointing=True),
}


def make_module(student: str, levers: Levers, samples: int = STEP.samples) -> DistillationModule:
    """Make the module that a training would train, `samples` a step."""
    torch.manual_seed(0)
    model = STUDENTS[student]()
    if levers.checkpointing:
        checkpoint_blocks(model)
    return DistillationModule(
        model,
        vocab_size=VOCABULARY,
        objective=Mixture(0.3),
        chunk_size=128,
        micro_batch=samples // levers.accumulate,
        make_optimizer=partial(
            make_optimizer,
            name=levers.optimizer,
            learning_rate=1e-3,
            weight_decay=0.1,
            betas=(0.9, 0.95),
            device_type=levers.device_type,
        ),
        make_schedule=lambda total: Schedule("cosine", total, 0.0, 0.2, 0.1),
        gradient_clip=1.0,
        saved_activations=offload_activations if levers.offload else nullcontext,
    )


def forecast(model: str, lever: str) -> Simulation:
    """Without memory."""
    if model in TEACHERS:
        make = partial(teacher, TEACHERS[model])
        return teacher_phase.simulate_teacher(
            make, **TEACHER_BATCH, vocab_size=TEACHER_VOCABULARY, scheme=SCHEME, chunk_size=128
        )
    return simulate_step(partial(make_module, model, LEVERS[lever]), STEP, precision=LEVERS[lever].precision)


def measured_teacher(model: str) -> dict[str, float]:
    """Bytes and seconds of a real batch."""

    def prepared() -> Callable[[], object]:
        torch.manual_seed(0)
        module = TeacherModule(teacher(TEACHERS[model]), TEACHER_VOCABULARY, SCHEME, seed=0, chunk_size=128)  # type: ignore[arg-type]
        batch = teacher_phase.make_batch(**TEACHER_BATCH, vocab_size=TEACHER_VOCABULARY)
        return lambda: module.predict_step(batch, 0)

    run, times = prepared(), []
    for _ in range(RUNS):
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    del run
    return {"peak": allocator_peak(prepared), "seconds": min(times[1:])}


def measured_step(student: str, levers: Levers) -> dict[str, float]:
    """Bytes and seconds of a real step."""

    def prepared() -> Callable[[], object]:
        module, batch = make_module(student, levers), make_batch(STEP, VOCABULARY)
        return lambda: run_steps(module, batch, levers.precision)

    clock = _Clock()
    run_steps(make_module(student, levers), make_batch(STEP, VOCABULARY), levers.precision, [clock], steps=RUNS)
    return {"peak": allocator_peak(prepared), "seconds": min(clock.seconds[1:])}


class _Clock(pl.Callback):
    """The processor's time of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.started = time.process_time()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds.append(time.process_time() - self.started)


def combinations(only: str) -> Iterator[tuple[str, str]]:
    """(model, lever), those of a model one after the other."""
    for model in (*STUDENTS, *TEACHERS):
        for lever in LEVERS if model in STUDENTS else ("a batch",):
            if only in f"{model}, {lever}":
                yield model, lever


def measured_apart(model: str, levers: list[str]) -> tuple[Efficiency, list[dict[str, float]]]:
    """The machine's calibration, and each lever's measurements, made in a process of their own."""
    command = [sys.executable, __file__, "--measure", model, *levers]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    efficiency, found = json.loads(done.stdout.splitlines()[-1])
    return Efficiency(**efficiency), found


def measure(model: str, levers: list[str]) -> None:
    """In the process of `measured_apart`."""
    efficiency = calibrate("cpu", time.process_time)
    found = [measured_teacher(model) if model in TEACHERS else measured_step(model, LEVERS[lever]) for lever in levers]
    print(json.dumps([asdict(efficiency), found]))


def table(only: str) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield "| model | levers | forecast MB | measured MB | ratio | forecast s | measured s | ratio |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|"
    models = dict.fromkeys(model for model, _ in combinations(only))
    for model in models:
        levers = [lever for other, lever in combinations(only) if other == model]
        efficiency, measurements = measured_apart(model, levers)
        pace = speed(this_machine("cpu"), efficiency)
        for lever, found in zip(levers, measurements, strict=True):
            simulation = forecast(model, lever)
            peak, seconds = simulation.peak_bytes, pace.seconds(simulation.work)
            yield (
                f"| {model} | {lever} | {peak / 1e6:,.1f} | {found['peak'] / 1e6:,.1f} | {peak / found['peak']:.3f} "
                f"| {seconds:.2f} | {found['seconds']:.2f} | {seconds / found['seconds']:.2f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="combinations whose name, such as 'compact, none', contains this")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "bitsandbytes", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if arguments.measure:
        measure(arguments.measure[0], arguments.measure[1:])
        return
    for line in table(arguments.only):
        print(line, flush=True)
    print(
        f"\nlargest resident set of the simulations: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB"
    )


if __name__ == "__main__":
    main()
