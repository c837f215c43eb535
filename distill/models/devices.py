"""Where a model runs and in which type, when the user leaves it to us."""

from __future__ import annotations

import torch

from distill.errors import UserError


def pick_device(accelerator: str) -> torch.device:
    """The device of a Lightning accelerator name: auto, cpu, cuda (or gpu), mps."""
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
    """`auto`: bfloat16 where CUDA has it, float16 on older cards, float32 elsewhere; other names stay."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
