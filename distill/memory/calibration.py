"""How much of its peak rates this machine reaches: measured in under a minute, kept for the forecasts of time.

Three kinds of kernels are timed alone (matrix products, element-wise ones, tiny ones); then a real training step of a
tiny llama is timed and its forecast scaled to be right.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from distill.files import read_bounded, write_durably
from distill.losses.objective import Mixture
from distill.memory.cards import Card, processor_name, this_machine
from distill.memory.disk import time_disk
from distill.memory.kernels import DeviceKind
from distill.memory.step import StepShape, make_batch, run_steps, simulate_step
from distill.memory.work import Speed
from distill.models.huggingface import HuggingFaceLanguageModel, quiet
from distill.training.module import DistillationModule
from distill.training.optimizers.adamw import make_optimizer
from distill.training.optimizers.schedule import Schedule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_VERSION = 2
_MOST_BYTES = 1 << 20
_SHARE_OF_FLOAT64 = 1 / 32
"""Of float32's rate, as on GeForce cards; nothing of weight is computed in it."""


@dataclass(frozen=True)
class Efficiency:
    """Shares of a card's peak rates that programs reach."""

    matmul: Mapping[str, float]
    """Of `half_flops` (bfloat16, float16) and `fp32_flops` (float32), by the type's name."""
    bandwidth: float
    """Of `bandwidth_bytes_per_s`."""
    launch: float
    """Seconds from one kernel to the next, at least."""
    reading: float = 1e9
    """Bytes a second read from disk, of a streamed teacher's weights; the default is an assumption."""
    is_measured: bool = False
    """Whether on this machine; else these are the defaults."""


DEFAULTS: dict[DeviceKind, Efficiency] = {
    # What training in plain PyTorch mostly reaches on cards: near the peak in large products, less in a model's.
    "cuda": Efficiency({"float32": 0.7, "bfloat16": 0.6, "float16": 0.6}, bandwidth=0.75, launch=8e-6),
    # Of the modest figures that `this_machine` assumes; processors differ by far more than cards do.
    "cpu": Efficiency({"float32": 0.6, "bfloat16": 0.6, "float16": 0.1}, bandwidth=0.5, launch=4e-6),
}


def speed(card: Card, efficiency: Efficiency | None = None) -> Speed:
    """What a card does in practice; `efficiency` is by default this machine's, where it was measured on such a device.

    On cards without bfloat16 its place is taken by float16: the simulation stands in the one for the other.
    """
    share = efficiency or find(kind_of(card))
    flops = {
        dtype: (card.fp32_flops if name == "float32" else card.half_flops) * share.matmul[name]
        for name, dtype in DTYPES.items()
    }
    if card.is_cuda and not card.has_bf16:
        flops[torch.bfloat16] = flops[torch.float16]
    flops[torch.float64] = flops[torch.float32] * _SHARE_OF_FLOAT64
    flops[torch.int8] = flops[torch.bfloat16]  # modest: a card's peak is twice that, and the codes are made anew
    return Speed(flops, card.bandwidth_bytes_per_s * share.bandwidth, share.launch)


def kind_of(card: Card) -> DeviceKind:
    """Under which of the two a card's efficiency is kept."""
    return "cuda" if card.is_cuda else "cpu"


def find(device: DeviceKind) -> Efficiency:
    """What was measured on this machine, else the defaults."""
    return load(device) or DEFAULTS[device]


def calibrate(
    device: DeviceKind, clock: Callable[[], float] = time.perf_counter, folder: Path | None = None
) -> Efficiency:
    """Measure this machine's efficiency, in under a minute, and its disk's where `folder` is. `save` keeps it.

    `clock`: seconds; `time.process_time` gives what a busy machine's only thread would do undisturbed.
    """
    card, timer = this_machine(device), _Timer(device, clock)
    kernels = Speed(
        {dtype: _rate_of_products(dtype, device, timer) for dtype in DTYPES.values()},
        _rate_of_moving(device, timer),
        timer.seconds(_add(torch.ones(16, device=device))),
    )
    factors = [_forecast_by_measured(kernels, precision, device, timer) for precision in _precisions(card)]
    found = kernels.times(math.exp(sum(map(math.log, factors)) / len(factors)))
    disk = None if folder is None else time_disk(folder)
    peaks = {name: card.fp32_flops if name == "float32" else card.half_flops for name in DTYPES}
    return Efficiency(
        {name: found.flops[dtype] / peaks[name] for name, dtype in DTYPES.items()},
        found.bytes / card.bandwidth_bytes_per_s,
        found.launch,
        Efficiency.reading if disk is None else disk[1],
        is_measured=True,
    )


def _precisions(card: Card) -> tuple[str, ...]:
    if not card.is_cuda:
        return "32-true", "bf16-mixed"
    return ("bf16-mixed",) if card.has_bf16 else ("16-mixed",)


class _Timer:
    """The shortest of some runs: what disturbs a run makes it longer, never shorter."""

    def __init__(self, device: DeviceKind, clock: Callable[[], float], budget: float = 0.4) -> None:
        self.device, self.clock, self.budget = device, clock, budget

    def now(self) -> float:
        """Seconds, when all that was started is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return self.clock()

    def seconds(self, run: Callable[[], object]) -> float:
        """Of a run: the best of five series, which together take about the budget."""
        run()
        start = self.now()
        run()
        times = max(1, min(1000, int(self.budget / 5 / max(self.now() - start, 1e-7))))
        best = math.inf
        for _ in range(5):
            start = self.now()
            for _ in range(times):
                run()
            best = min(best, (self.now() - start) / times)
        return max(best, 1e-9)


def _add(tensor: torch.Tensor) -> Callable[[], object]:
    return lambda: tensor + tensor


def _rate_of_products(dtype: torch.dtype, device: DeviceKind, timer: _Timer) -> float:
    """FLOP/s over a square product, a tall one as of tokens and a weight, and a small one as of a head's."""
    n = 512 if device == "cpu" else 4096
    flops = seconds = 0.0
    for rows, inner, columns in ((n, n, n), (4 * n, n // 2, n // 2), (n // 4, n // 4, n // 4)):
        left = torch.randn(rows, inner, device=device).to(dtype)
        right = torch.randn(inner, columns, device=device).to(dtype)
        flops += 2.0 * rows * inner * columns
        seconds += timer.seconds(partial(torch.matmul, left, right))
    return flops / seconds


def _rate_of_moving(device: DeviceKind, timer: _Timer) -> float:
    """Bytes a second of additions, of tensors that a processor's cache holds and of such that it does not."""
    moved = seconds = 0.0
    for size in (2**20, 2**22) if device == "cpu" else (2**24, 2**26):
        tensor = torch.ones(size, device=device)
        moved += 2.0 * tensor.nbytes
        seconds += timer.seconds(_add(tensor))
    return moved / seconds


def _forecast_by_measured(kernels: Speed, precision: str, device: DeviceKind, timer: _Timer) -> float:
    """By how much the forecast of a real step is too long (above 1) or too short."""
    large = device == "cuda"
    shape = StepShape(samples=8, length=512) if large else StepShape(samples=4, length=128)
    make, clock = partial(_tiny_llama, large), _Clock(timer)
    with quiet():
        work = simulate_step(make, shape, precision=precision, device=device).work
        run_steps(make(), make_batch(shape), precision, [clock], accelerator=device, steps=5)
    return kernels.seconds(work) / min(clock.seconds[1:])


class _Clock(pl.Callback):
    """The time of every step."""

    def __init__(self, timer: _Timer) -> None:
        self.timer = timer
        self.seconds: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.started = self.timer.now()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds.append(self.timer.now() - self.started)


def _tiny_llama(large: bool) -> DistillationModule:
    import transformers

    width, layers, vocab_size = (1024, 8, 32_000) if large else (384, 4, 8192)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
    )
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return DistillationModule(
        HuggingFaceLanguageModel(model),
        vocab_size=vocab_size,
        objective=Mixture(0.3),
        chunk_size=256,
        micro_batch=4,
        make_optimizer=partial(make_optimizer, name="adamw", learning_rate=1e-4, weight_decay=0.1, betas=(0.9, 0.95)),
        make_schedule=lambda total: Schedule("cosine", total, 0.0, 0.2, 0.1),
        gradient_clip=1.0,
    )


def identity(device: DeviceKind) -> dict[str, Any]:
    """What a calibration holds for."""
    found: dict[str, Any] = {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if device == "cuda" and torch.cuda.is_available():
        card = this_machine()
        found |= {"card": card.name, "card_memory_bytes": card.memory_bytes}
    return found


def file() -> Path:
    """`distill/calibration.json` in the user's cache folder."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG base directory specification: a relative path is to be ignored.
    return (folder if folder.is_absolute() else Path.home() / ".cache") / "distill" / "calibration.json"


def save(device: DeviceKind, efficiency: Efficiency) -> Path:
    """Keep a calibration durably, beside that of the other kind of device. Raises OSError."""
    content = _read() | {device: {"identity": identity(device), "efficiency": asdict(efficiency)}}
    write_durably(file(), json.dumps({"version": _VERSION, **content}, indent=2).encode())
    return file()


def load(device: DeviceKind) -> Efficiency | None:
    """What was saved; None when there is none, when it is another machine's, and when it cannot be read."""
    entry = _read().get(device)
    if not isinstance(entry, dict) or entry.get("identity") != identity(device):
        return None
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        given = entry["efficiency"]
        matmul = {name: float(given["matmul"][name]) for name in DTYPES}
        rest = [float(given[name]) for name in ("bandwidth", "launch", "reading")]
        if all(math.isfinite(number) and number > 0 for number in (*matmul.values(), *rest)):
            return Efficiency(matmul, rest[0], rest[1], rest[2], is_measured=True)
    return None


def _read() -> dict[str, Any]:
    try:
        content = json.loads(read_bounded(file(), _MOST_BYTES))
    except (OSError, ValueError, RuntimeError):  # the last: nobody's home is known
        return {}
    return content if isinstance(content, dict) and content.get("version") == _VERSION else {}
