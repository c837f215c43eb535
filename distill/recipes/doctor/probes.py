"""Probes of `distill doctor`: small functions that each look at one thing, and raise if it does not work."""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill.forecast.machine import calibration, measuring
from distill.forecast.machine.calibration import Efficiency
from distill.forecast.machine.cards import this_machine
from distill.forecast.machine.disk import time_disk
from distill.forecast.simulation.kernels import DeviceKind
from distill.recipes.doctor import capacity
from distill.system.machine import version_of
from distill.system.memory import available_memory

REQUIRED = ("torch", "lightning", "transformers", "datasets", "bitsandbytes", "peft", "torchmetrics", "safetensors")
OPTIONAL = {
    "lm-eval": "benchmarks",
    "gguf": "GGUF files",
    "xllamacpp": "checking GGUF exports by llama.cpp",
    "onnx": "ONNX export",
    "onnxscript": "ONNX export",
    "onnxruntime": "checking ONNX exports",
    "torchao": "adamw_4bit",
    "tensorboard": "logs in TensorBoard",
    "wandb": "logs in Weights & Biases",
    "nvidia-ml-py": "energy of NVIDIA cards",
}
"""Optional packages, and their purposes."""


@dataclass(frozen=True)
class Probes:
    """All probes. Tests put fakes in their place."""

    software: Callable[[], dict[str, Any]]
    host: Callable[[], dict[str, Any]]
    device: Callable[[], dict[str, Any]]
    driver: Callable[[], dict[str, Any] | None]
    four_bit: Callable[[DeviceKind], dict[str, float]]
    eight_bit_optimizer: Callable[[], None]
    disk: Callable[[Path], dict[str, float]]
    packages: Callable[[], dict[str, str | None]]
    capacity: Callable[[DeviceKind, float], list[dict[str, Any]]]
    calibrate: Callable[[DeviceKind], Efficiency]


def software() -> dict[str, Any]:
    """Return the versions of Python and torch, and the build of torch."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda_build": torch.version.cuda,
    }


def host() -> dict[str, Any]:
    """Return the processor and its memory."""
    card = this_machine("cpu")
    found = {"processor": card.name, "cores": os.cpu_count() or 1, "threads": torch.get_num_threads()}
    return {**found, "memory_bytes": card.memory_bytes, "free_bytes": available_memory()}


def device() -> dict[str, Any]:
    """Return the card that models run on, else the processor."""
    card = this_machine()
    found: dict[str, Any] = {"name": card.name, "is_cuda": card.is_cuda, "bf16": card.has_bf16}
    if not card.is_cuda:
        return found
    index = torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    return {
        **found,
        "count": torch.cuda.device_count(),
        "memory_bytes": total,
        "free_bytes": free,
        "capability": f"{major}.{minor}",
        "is_in_build": _is_in_build(major, minor, torch.cuda.get_arch_list()),
    }


def _is_in_build(major: int, minor: int, built_for: list[str]) -> bool:
    """Tell whether a build has code for a capability: same major and no larger minor number, or portable code."""
    pairs = [name.partition("_") for name in built_for]
    codes = [(kind, int(digits[:-1]), int(digits[-1])) for kind, _, digits in pairs if digits.isdigit()]
    own = any(kind == "sm" and code == major and least <= minor for kind, code, least in codes)
    portable = any(kind == "compute" and (code, least) <= (major, minor) for kind, code, least in codes)
    return own or portable or not codes


def driver() -> dict[str, Any] | None:
    """Return nvidia-smi's answer, even if torch cannot use the card; None without nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    lines = [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines() if line.count(",") == 2]
    if done.returncode or not lines:
        raise RuntimeError(f"nvidia-smi: {(done.stdout + done.stderr).strip().splitlines()[:1] or done.returncode}")
    return {"version": lines[0][1], "cards": [name for name, _, _ in lines]}


def four_bit(kind: DeviceKind) -> dict[str, float]:
    """Quantise a weight to NF4 on the device and multiply with it.

    `weight_error` is that of the dequantised weight; `product_error` that of the product against the one with the
    dequantised weight. Both are root mean square, relative.
    """
    import bitsandbytes as bnb

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(384, 512, generator=generator).to(kind)
    given = torch.randn(64, 512, generator=generator).to(kind)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    dequantized = bnb.functional.dequantize_4bit(packed, state)
    product = bnb.matmul_4bit(given, packed.t(), quant_state=state)
    return {
        "weight_error": _relative(dequantized, weight),
        "product_error": _relative(product, given @ dequantized.t()),
    }


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    if not math.isfinite(error):
        raise RuntimeError("4-bit layers give numbers that are not finite")
    return error


def eight_bit_optimizer() -> None:
    """Make a step of bitsandbytes' AdamW on the card. Raises if the weight did not move, or is not finite."""
    import bitsandbytes as bnb

    weight = torch.nn.Parameter(torch.ones(128, 128, device="cuda"))
    optimizer = bnb.optim.AdamW8bit([weight], lr=1e-2)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    if not weight.isfinite().all() or bool((weight == 1).any()):
        raise RuntimeError("a step of AdamW8bit did not move the weights")


def disk(folder: Path) -> dict[str, float]:
    """Return the free bytes at `folder`, and bytes a second written and read there, if there is room to try."""
    speeds = time_disk(folder)
    found: dict[str, float] = {"free_bytes": shutil.disk_usage(folder).free}
    return found if speeds is None else found | {"write_bytes_per_s": speeds[0], "read_bytes_per_s": speeds[1]}


def packages() -> dict[str, str | None]:
    """Return the versions of required and optional packages. None means not installed."""
    return {name: version_of(name) for name in (*REQUIRED, *OPTIONAL)}


def _calibrate(kind: DeviceKind) -> Efficiency:
    efficiency = measuring.calibrate(kind, folder=Path.cwd())
    calibration.save(kind, efficiency)
    return efficiency


REAL = Probes(software, host, device, driver, four_bit, eight_bit_optimizer, disk, packages, capacity.table, _calibrate)
