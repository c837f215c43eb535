"""The device of a model and its compute dtype: the choice behind `auto`."""

from __future__ import annotations

import functools
import time

import torch

from distill.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types of weights and of computation, by their names in an experiment."""

WORTH_IT = 1.2
"""Speed of bfloat16, in float32's, from which a processor takes it: below, casting eats up the gain."""
_TOKENS, _SIZE, _PAIRS = 256, 1024, 5
"""Shape of the product that is timed, as of a small model's layer, and the number of timed pairs."""


def pick_device(accelerator: str) -> torch.device:
    """Return the device of a Lightning accelerator name: auto, cpu, cuda (or gpu), mps."""
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator in ("cuda", "gpu"):
        if not torch.cuda.is_available():
            raise UserError("train.accelerator: no CUDA device found here; use auto or cpu")
        return torch.device("cuda", torch.cuda.current_device())
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise UserError("train.accelerator: no Apple GPU found here; use auto or cpu")
    if accelerator in ("cpu", "mps"):
        return torch.device(accelerator)
    raise UserError(f"train.accelerator: '{accelerator}' is unknown (known: auto, cpu, cuda, mps)")


def check_number(wanted: int, device_type: str, key: str) -> None:
    """Raise UserError that names the `key` if this machine has fewer devices; on a CPU they are processes."""
    there = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device_type, wanted)
    if wanted > there:
        raise UserError(f"{key}: {wanted} are asked for, and this machine has {there} ({device_type}): give {there}")


def compute_dtype(name: str, device: torch.device) -> str:
    """Return the name of a type; `auto` is the fastest one of this machine's device, other names stay.

    On CUDA the hardware tells, on a processor a measurement: many take bfloat16 and compute in it more slowly than in
    float32.
    """
    if name != "auto":
        return name
    if device.type == "cpu":
        return "bfloat16" if bfloat16_speed() >= WORTH_IT else "float32"
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return dtype_of_card(device.type == "cuda", has_bf16)


def dtype_of_card(is_cuda: bool, has_bf16: bool) -> str:
    """Return the type that `auto` stands for on a card that may be elsewhere: float16 where CUDA lacks bfloat16."""
    return "float32" if not is_cuda else "bfloat16" if has_bf16 else "float16"


@functools.lru_cache(maxsize=1)
def bfloat16_speed() -> float:
    """Return the speed of this processor's matrix products in bfloat16, in float32's.

    Both are timed in turn. The shortest times count, since a disturbance makes a product longer, never shorter.
    """
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    factors = {dtype: [torch.ones(size, _SIZE, dtype=dtype) for size in (_TOKENS, _SIZE)] for dtype in best}
    for number in range(1 + _PAIRS):
        for dtype, (left, right) in factors.items():
            begin = time.perf_counter()
            torch.nn.functional.linear(left, right)
            if number:  # the first product of a type prepares its kernel
                best[dtype] = min(best[dtype], time.perf_counter() - begin)
    return best[torch.float32] / best[torch.bfloat16]
