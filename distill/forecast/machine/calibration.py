"""Shares of a card's peak rates that programs reach: by default, and as measured on this machine."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from distill.forecast.machine.cards import Card, this_machine
from distill.forecast.simulation.kernels import DeviceKind
from distill.forecast.simulation.work import Speed
from distill.models.devices import DTYPES
from distill.system.files import read_bounded, write_durably
from distill.system.machine import processor_name

_VERSION = 3
_MOST_BYTES = 1 << 20
_FRESH = 3.0
"""Ratio of the times of a byte in new memory and another. A processor's program gets new memory page by page from the
system, empty. The value is the least squares over all rows of tests/benchmarks/forecast_accuracy.py; a card's allocator
has its memory already.
"""
_SHARE_OF_FLOAT64 = 1 / 32
"""Share of float32's rate, as on GeForce cards; nothing of weight is computed in it."""


@dataclass(frozen=True)
class Efficiency:
    """Shares of a card's peak rates that programs reach."""

    matmul: Mapping[str, float]
    """Shares of `half_flops` (bfloat16, float16) and `fp32_flops` (float32), by the type's name."""
    bandwidth: float
    """Share of `bandwidth_bytes_per_s`."""
    launch: float
    """Seconds that the program takes from one kernel to the next."""
    reading: float = 1e9
    """Bytes a second read from disk, of a streamed teacher's weights; the default is an assumption."""
    is_measured: bool = False
    """True if measured on this machine; else these are the defaults."""


DEFAULTS: dict[DeviceKind, Efficiency] = {
    # Training in plain PyTorch mostly reaches these on cards: near the peak in large products, less in a model's.
    "cuda": Efficiency({"float32": 0.7, "bfloat16": 0.6, "float16": 0.6}, bandwidth=0.75, launch=1e-5),
    # Of the modest figures that `this_machine` assumes; processors differ by far more than cards do.
    "cpu": Efficiency({"float32": 0.6, "bfloat16": 0.6, "float16": 0.1}, bandwidth=0.7, launch=6e-6),
}


def speed(card: Card, efficiency: Efficiency | None = None) -> Speed:
    """Return a card's real speed. `efficiency` is by default this machine's, if measured on such a device.

    On cards without bfloat16 float16 takes its place, because the simulation uses bfloat16 for both.
    """
    share = efficiency or find(kind_of(card))
    flops = {
        dtype: (card.fp32_flops if name == "float32" else card.half_flops) * share.matmul[name]
        for name, dtype in DTYPES.items()
    }
    if card.is_cuda and not card.has_bf16:
        flops[torch.bfloat16] = flops[torch.float16]
    flops[torch.float64] = flops[torch.float32] * _SHARE_OF_FLOAT64
    # Modest: a card's peak is twice that, and codes are made of the inputs anew each time.
    flops[torch.int8] = flops[torch.bfloat16] if card.is_cuda else flops[torch.float32]
    bandwidth = card.bandwidth_bytes_per_s * share.bandwidth
    if card.is_cuda:
        return Speed(flops, bandwidth, share.launch)
    return Speed(flops, bandwidth, share.launch, in_turn=True, fresh=_FRESH)


def kind_of(card: Card) -> DeviceKind:
    """Return the kind of device under which a card's efficiency is kept."""
    return "cuda" if card.is_cuda else "cpu"


def find(device: DeviceKind) -> Efficiency:
    """Return the measurement of this machine, else the defaults."""
    return load(device) or DEFAULTS[device]


def identity(device: DeviceKind) -> dict[str, Any]:
    """Return the facts that a calibration holds for."""
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
    """Return the path of `distill/calibration.json` in the user's cache folder."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG base directory specification: a relative path is to be ignored.
    return (folder if folder.is_absolute() else Path.home() / ".cache") / "distill" / "calibration.json"


def save(device: DeviceKind, efficiency: Efficiency) -> Path:
    """Keep a calibration durably, beside that of the other kind of device. Raises OSError."""
    content = _read() | {device: {"identity": identity(device), "efficiency": asdict(efficiency)}}
    write_durably(file(), json.dumps({"version": _VERSION, **content}, indent=2).encode())
    return file()


def load(device: DeviceKind) -> Efficiency | None:
    """Return the saved calibration; None if there is none, if it is another machine's, or if it cannot be read."""
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
