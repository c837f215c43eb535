"""The device of a model and its compute dtype: the choice behind `auto`."""

from __future__ import annotations

import torch

from distill.errors import UserError


def pick_device(accelerator: str) -> torch.device:
    """Return the device of a Lightning accelerator name: auto, cpu, cuda (or gpu), mps."""
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator in ("cuda", "gpu"):
        if not torch.cuda.is_available():
            raise UserError("train.accelerator: no CUDA device found here; use auto or cpu")
        return torch.device("cuda", torch.cuda.current_device())
    if accelerator in ("cpu", "mps"):
        return torch.device(accelerator)
    raise UserError(f"train.accelerator: '{accelerator}' is unknown (known: auto, cpu, cuda, mps)")


def compute_dtype(name: str, device: torch.device) -> str:
    """Choose for `auto`: bfloat16 on CUDA cards that have it, float16 on older ones, else float32. Others stay."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
