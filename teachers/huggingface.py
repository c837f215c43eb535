"""A frozen teacher from any Hugging Face checkpoint or GGUF file, in 4 bits (NF4), 8 bits, or unquantised."""

from __future__ import annotations

import torch

from distill.models import devices
from distill.models.checkpoints import resolve
from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.quantization import Quantization, load_quantized
from distill.models.shapes import declare


@declare(layer_by_layer="streamed")
def load_teacher(
    model: str,
    quantization: Quantization = "nf4",
    compute_dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_unquantized: bool = False,
) -> HuggingFaceLanguageModel:
    """Load the frozen teacher on `device`: its matrices quantised, embeddings, norms and head in the compute dtype.

    `allow_unquantized`: also a family of whose matrices more than a tenth stay as they are.
    """
    dtype, checkpoint = resolve_dtype(compute_dtype, device), resolve(model, revision, trust_remote_code)
    loaded = load_quantized(checkpoint, quantization, dtype, device, trust_remote_code, allow_unquantized)
    teacher = HuggingFaceLanguageModel(loaded).eval().requires_grad_(False)
    teacher.check()
    return teacher


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """Return the compute dtype. `auto` is the fastest one of the device."""
    if name != "auto" and name not in devices.DTYPES:
        raise ValueError(f"compute_dtype '{name}' is unknown (known: auto, {', '.join(devices.DTYPES)})")
    return devices.DTYPES[devices.compute_dtype(name, torch.device(device))]
