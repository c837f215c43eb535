"""The device of a model and its compute dtype: the choice behind `auto`."""

from __future__ import annotations

import torch

from distill.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types of weights and of computation, by their names in an experiment."""


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
    """Return the name of a type; `auto` is the best that the device has, other names stay."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return best_dtype(device.type == "cuda", has_bf16) if name == "auto" else name


def best_dtype(is_cuda: bool, has_bf16: bool) -> str:
    """Return the type that `auto` stands for: bfloat16 where CUDA has it, float16 on older cards, else float32."""
    return "float32" if not is_cuda else "bfloat16" if has_bf16 else "float16"
