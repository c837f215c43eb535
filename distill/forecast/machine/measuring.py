"""Measurement of this machine's speed: kernels and real work are timed, and the forecast's rates are fitted to them.

Matrix products are timed alone. A training step of a tiny model, which mostly starts kernels, gives the time of a
launch. The rate of moving bytes is fitted last: with it, the forecasts of a larger model's training steps, in float32
and in 16 bits, are right on average.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from distill.experiment.configuration import Experiment, LossConfig, StudentConfig, TrainConfig
from distill.experiment.place import Place
from distill.experiment.roles import roles
from distill.experiment.student import make_student
from distill.experiment.teacher_sections import CorpusConfig, TeacherConfig
from distill.experiment.training import make_module
from distill.forecast.machine.calibration import DEFAULTS, Efficiency, kind_of, speed
from distill.forecast.machine.cards import Card, this_machine
from distill.forecast.machine.disk import time_disk
from distill.forecast.phases.step import StepShape, make_batch, run_steps, simulate_step
from distill.forecast.simulation.kernels import DeviceKind
from distill.forecast.simulation.work import Work
from distill.models.devices import DTYPES
from distill.system.quiet import quiet_transformers
from distill.training.module import DistillationModule

_FURTHEST, _ROUNDS = 64.0, 8
"""Largest factor between a number and its first guess, and the rounds in which both are fitted in turn."""
_RUNS = 10
"""Runs of each piece of work. The shortest counts, since a disturbance makes a run longer, never shorter."""


@dataclass(frozen=True)
class Timed:
    """A piece of work that was done and timed."""

    work: Counter[Work]
    seconds: float


def calibrate(
    device: DeviceKind, clock: Callable[[], float] = time.perf_counter, folder: Path | None = None
) -> Efficiency:
    """Measure this machine's efficiency, in under a minute, and that of its disk at `folder`.

    `clock` gives seconds; `time.process_time` gives the time that the only thread of a busy machine would take
    undisturbed.
    """
    card, pace = this_machine(device), _Pace(device, clock)
    peaks = {name: card.fp32_flops if name == "float32" else card.half_flops for name in DTYPES}
    matmul = {name: pace.products(dtype) / peaks[name] for name, dtype in DTYPES.items()}
    with quiet_transformers():
        tiny = pace.step(_TINY, "32-true")
        others = [pace.step(_LARGER[device], precision) for precision in _precisions(card)]
    found = fit(card, replace(DEFAULTS[device], matmul=matmul), tiny, others)
    disk = None if folder is None else time_disk(folder)
    return replace(found, reading=Efficiency.reading if disk is None else disk[1], is_measured=True)


def fit(card: Card, efficiency: Efficiency, tiny: Timed, others: Sequence[Timed]) -> Efficiency:
    """Fit the launch so that the tiny work's forecast is right, and the bandwidth so that the others' are on average.

    The average is the geometric mean of ratios.
    """
    for _ in range(_ROUNDS):
        efficiency = _set_right(card, efficiency, "launch", [tiny])
        efficiency = _set_right(card, efficiency, "bandwidth", others)
    return efficiency


def _set_right(
    card: Card, efficiency: Efficiency, name: Literal["launch", "bandwidth"], works: Sequence[Timed]
) -> Efficiency:
    """Change one number, by bisection of its logarithm."""
    usual = getattr(DEFAULTS[kind_of(card)], name)
    low, high = math.log(usual / _FURTHEST), math.log(usual * _FURTHEST)
    is_rate = name == "bandwidth"
    for _ in range(40):
        middle = (low + high) / 2
        pace = speed(card, replace(efficiency, **{name: math.exp(middle)}))  # type: ignore[arg-type]
        is_slow = sum(math.log(pace.seconds(timed.work) / timed.seconds) for timed in works) > 0
        low, high = (middle, high) if is_slow == is_rate else (low, middle)
    return replace(efficiency, **{name: math.exp((low + high) / 2)})  # type: ignore[arg-type]


def _precisions(card: Card) -> tuple[str, ...]:
    """Return the precisions of trainings here."""
    if not card.is_cuda:
        return "32-true", "bf16-mixed"
    return ("bf16-mixed",) if card.has_bf16 else ("16-mixed",)


@dataclass(frozen=True)
class _Model:
    width: int
    layers: int
    vocab_size: int
    shape: StepShape


_TINY = _Model(64, 8, 256, StepShape(samples=1, length=16))
_LARGER: dict[DeviceKind, _Model] = {
    "cpu": _Model(384, 4, 8192, StepShape(samples=4, length=128)),
    "cuda": _Model(1024, 8, 32_000, StepShape(samples=8, length=512)),
}


class _Pace:
    """A clock that does pieces of work and times them."""

    def __init__(self, device: DeviceKind, clock: Callable[[], float]) -> None:
        self.device, self.clock = device, clock

    def now(self) -> float:
        """Return the clock's seconds when all started work is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return self.clock()

    def products(self, dtype: torch.dtype) -> float:
        """Return FLOP/s over a square product, a tall one as of tokens and a weight, and a small one as of a head's."""
        n = 512 if self.device == "cpu" else 4096
        flops = seconds = 0.0
        for rows, inner, columns in ((n, n, n), (4 * n, n // 2, n // 2), (n // 4, n // 4, n // 4)):
            left = torch.randn(rows, inner, device=self.device).to(dtype)
            right = torch.randn(inner, columns, device=self.device).to(dtype)
            flops += 2.0 * rows * inner * columns
            seconds += self.seconds(partial(torch.matmul, left, right))
        return flops / seconds

    def seconds(self, run: Callable[[], object], budget: float = 0.4) -> float:
        """Return the seconds of a run: the best of five series, which together take about the budget."""
        run()
        start = self.now()
        run()
        times = max(1, min(1000, int(budget / 5 / max(self.now() - start, 1e-7))))
        best = math.inf
        for _ in range(5):
            start = self.now()
            for _ in range(times):
                run()
            best = min(best, (self.now() - start) / times)
        return max(best, 1e-9)

    def step(self, model: _Model, precision: str) -> Timed:
        """Time an optimiser step in two passes."""
        make, clock = partial(_module, model), _Clock(self)
        work = simulate_step(make, model.shape, precision=precision, device=self.device).work
        batch = make_batch(model.shape, model.vocab_size)
        run_steps(make(), batch, precision, [clock], accelerator=self.device, steps=_RUNS)
        return Timed(work, min(clock.seconds[1:]))


class _Clock(pl.Callback):
    """The time of every step."""

    def __init__(self, pace: _Pace) -> None:
        self.pace = pace
        self.seconds: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.started = self.pace.now()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds.append(self.pace.now() - self.started)


def _module(model: _Model) -> DistillationModule:
    """Make the module of a training of a small llama, on the host."""
    config = {
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": 11 * model.width // 4,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.width // 32,
        "num_key_value_heads": model.width // 64,
    }
    experiment = Experiment(
        CorpusConfig("", sequence_length=model.shape.length),
        TeacherConfig(""),
        StudentConfig("huggingface", {"config": config}),
        loss=LossConfig(alpha=0.3),
        train=TrainConfig(batch_size=-(-model.shape.samples // 2)),  # two passes a step
    )
    host = Place.host()
    student, _ = make_student(experiment, host, model.vocab_size)
    return make_module(experiment, host, roles(experiment)[0], student, model.vocab_size)
