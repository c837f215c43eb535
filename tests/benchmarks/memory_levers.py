"""Peak memory and step time of every memory lever, alone and together: `python tests/benchmarks/memory_levers.py`.

A student of Llama's architecture (by default 8 layers of 384, vocabulary 4,096, 8 x 64 tokens a step) makes steps as
the training does: body, fused loss, backward, clip, step. For each lever are printed the largest number of bytes that
exist at one time, from the first parameter to the end of the second step, and the median time of a step. On a CPU the
bytes are torch's own allocations, added up from the profiler's record of its allocator; on a CUDA device they are its
counter's (`torch.cuda.max_memory_allocated`). Levers that need a CUDA device say so where there is none.
`python tests/benchmarks/bench.py --only memory_levers` has those alone, which only a card can measure.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from paired import Row, Setup, allocator_peak, not_measured, number_row
from torch import Tensor

from distill.losses.chunks import SparseChunk
from distill.losses.divergences import forward_kl
from distill.losses.fused import fused_loss
from distill.training.activation_checkpointing import checkpoint_blocks
from distill.training.offload import offload_activations
from distill.training.optimizers.adamw import make_optimizer
from distill.training.optimizers.step_in_backward import StepInBackward
from students.compact import CompactDecoder

ENTRIES = 40
"""Tokens of a sparse target."""
SIZES = {"layers": 8, "hidden": 384, "vocabulary": 4096, "samples": 8, "length": 64}
"""Sizes of the student and of a step."""


@dataclass(frozen=True)
class Levers:
    """Levers that can be turned on. The defaults are the table's first row."""

    precision: str = "bf16-mixed"
    optimizer: str = "adamw"
    rounding: Any = "nearest"
    checkpoint_every_k: int = 0
    accumulate: int = 1
    step_in_backward: bool = False
    offload: bool = False
    chunk_size: int = 256

    @property
    def needs_cuda(self) -> bool:
        return self.offload or self.optimizer.startswith("paged")


ROWS: dict[str, Levers] = {
    "none (bf16-mixed: float32 master weights)": Levers(),
    "`precision: 32-true`": Levers(precision="32-true"),
    "`accumulate_grad_batches: 4`, a fourth of the samples each": Levers(accumulate=4),
    "`activation_checkpointing`": Levers(checkpoint_every_k=1),
    "`activation_checkpointing`, `checkpoint_every_k: 2`": Levers(checkpoint_every_k=2),
    "`offload_activations`": Levers(offload=True),
    "`precision: bf16-true`, `rounding: nearest`": Levers(precision="bf16-true"),
    "`bf16-true`, `rounding: stochastic`": Levers(precision="bf16-true", rounding="stochastic"),
    "`bf16-true`, `rounding: kahan`": Levers(precision="bf16-true", rounding="kahan"),
    "`optimizer: adamw_8bit`": Levers(optimizer="adamw_8bit"),
    "`optimizer: adamw_4bit`": Levers(optimizer="adamw_4bit"),
    "`optimizer: paged_adamw_8bit`": Levers(optimizer="paged_adamw_8bit"),
    "`loss.chunk_size: 64`": Levers(chunk_size=64),
    "`step_in_backward`": Levers(step_in_backward=True),
    "checkpointing, chunks of 64": Levers(checkpoint_every_k=1, chunk_size=64),
    "checkpointing, chunks of 64, step in backward": Levers(checkpoint_every_k=1, chunk_size=64, step_in_backward=True),
    "checkpointing, chunks of 64, 8-bit, accumulation of 4": Levers(
        optimizer="adamw_8bit", checkpoint_every_k=1, accumulate=4, chunk_size=64
    ),
    "checkpointing, chunks of 64, 8-bit, step in backward": Levers(
        optimizer="adamw_8bit", checkpoint_every_k=1, chunk_size=64, step_in_backward=True
    ),
    "checkpointing, chunks of 64, 8-bit, step in backward, bf16-true stochastic": Levers(
        "bf16-true", "adamw_8bit", "stochastic", checkpoint_every_k=1, chunk_size=64, step_in_backward=True
    ),
    "checkpointing, chunks of 64, 4-bit, step in backward, bf16-true kahan": Levers(
        "bf16-true", "adamw_4bit", "kahan", checkpoint_every_k=1, chunk_size=64, step_in_backward=True
    ),
    "the same and `offload_activations`": Levers(
        "bf16-true", "adamw_4bit", "kahan", 1, step_in_backward=True, offload=True, chunk_size=64
    ),
}


@dataclass
class Training:
    """A student and its optimiser under some levers."""

    levers: Levers
    sizes: argparse.Namespace
    device: torch.device
    step_times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        sizes, levers = self.sizes, self.levers
        student = CompactDecoder(sizes.vocabulary, sizes.hidden, sizes.layers, heads=4)
        self.student = student.to(self.device, torch.bfloat16 if levers.precision == "bf16-true" else None)
        if levers.checkpoint_every_k:
            checkpoint_blocks(self.student, levers.checkpoint_every_k)
        self.optimizer = make_optimizer(
            self.student,
            name=levers.optimizer,
            learning_rate=1e-3,
            weight_decay=0.1,
            betas=(0.9, 0.95),
            rounding=levers.rounding,
        )
        if levers.step_in_backward:
            self.optimizer = StepInBackward(self.optimizer, self.student)

    def micro_batches(self) -> Iterator[tuple[Tensor, SparseChunk]]:
        """Token ids and their targets, made pass by pass."""
        sizes, samples = self.sizes, self.sizes.samples // self.levers.accumulate
        for _ in range(self.levers.accumulate):
            ids_BL = torch.randint(sizes.vocabulary, (samples, sizes.length), device=self.device)
            positions = samples * sizes.length
            ids_NK = torch.randint(sizes.vocabulary, (positions, ENTRIES), device=self.device)
            weights_NK = torch.full((positions, ENTRIES), 1 / ENTRIES, device=self.device)
            yield ids_BL, SparseChunk(ids_NK, weights_NK, torch.zeros(positions, device=self.device), ids_BL.flatten())

    def loss(self, ids_BL: Tensor, target: SparseChunk) -> Tensor:
        positions_BL = torch.arange(self.sizes.length, device=self.device).expand_as(ids_BL)
        mixed = self.levers.precision == "bf16-mixed"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed, cache_enabled=False):
            with offload_activations(self.student) if self.levers.offload else nullcontext():
                hidden_BLD = self.student.body(ids_BL, positions_BL)
            loss = fused_loss(hidden_BLD.flatten(0, 1), self.student.head, target, forward_kl, self.levers.chunk_size)
        return loss / (self.sizes.samples * self.sizes.length)

    def step(self) -> None:
        started = time.perf_counter()
        for ids_BL, target in self.micro_batches():
            self.loss(ids_BL, target).backward()
        if not self.levers.step_in_backward:
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.step_times.append(time.perf_counter() - started)


def _two_steps(levers: Levers, sizes: argparse.Namespace, device: torch.device) -> None:
    training = Training(levers, sizes, device)
    training.step()
    training.step()


def step_seconds(levers: Levers, sizes: argparse.Namespace, device: torch.device) -> float:
    """Median, after one step that is not counted."""
    training = Training(levers, sizes, device)
    for _ in range(sizes.steps + 1):
        training.step()
    return statistics.median(training.step_times[1:])


def rows(setup: Setup) -> Iterator[Row]:
    """Yield time and memory of levers that need a CUDA device, in shares of none; in the sizes of a test of all."""
    sizes = SIZES | ({"layers": 2, "hidden": 32, "vocabulary": 128, "samples": 4, "length": 16} if setup.tiny else {})
    setting, device = argparse.Namespace(**sizes, steps=setup.repeats), torch.device(setup.device)
    case = f"{sizes['layers']} layers of {sizes['hidden']}, {sizes['samples']} x {sizes['length']}"
    none: list[float] = []
    for name, levers in ROWS.items():
        if levers.needs_cuda and device.type == "cpu":
            yield not_measured("memory_levers", case, name, "needs a CUDA device")
        elif levers.needs_cuda or setup.tiny or (device.type != "cpu" and not none):
            found = [step_seconds(levers, setting, device), _peak(levers, setting, device) / 1e6]
            none = none or found
            yield number_row("memory_levers", case, f"{name}: time of none", found[0], none[0], "{:.3g} s")
            yield number_row("memory_levers", case, f"{name}: peak memory of none", found[1], none[1], "{:,.1f} MB")


def _peak(levers: Levers, sizes: argparse.Namespace, device: torch.device) -> int:
    return allocator_peak(lambda: partial(_two_steps, levers, sizes, device), device.type)


def table(sizes: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield f"| levers | peak MB | of none | s a step (median of {sizes.steps}) | of none |"
    yield "|---|---:|---:|---:|---:|"
    baseline: tuple[int, float] | None = None
    for name, levers in ROWS.items():
        if levers.needs_cuda and device.type != "cuda":
            yield f"| {name} | needs a CUDA device | | | |"
            continue
        seconds = step_seconds(levers, sizes, device)
        peak = _peak(levers, sizes, device)
        baseline = baseline or (peak, seconds)
        yield f"| {name} | {peak / 1e6:,.1f} | {peak / baseline[0]:.0%} | {seconds:.2f} | {seconds / baseline[1]:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    sizes = parser.parse_args()
    device = torch.device(sizes.device)
    # Kernels, autotuning and imports before the first measurement.
    _two_steps(replace(Levers(), optimizer="adamw_8bit"), sizes, device)
    parameters = sum(p.numel() for p in Training(Levers(), sizes, device).student.parameters())
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{parameters / 1e6:.1f} M parameters, {sizes.samples} x {sizes.length} tokens a step, {where}\n")
    for line in table(sizes, device):
        print(line, flush=True)


if __name__ == "__main__":
    main()
