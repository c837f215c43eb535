"""A frozen teacher from any Hugging Face checkpoint or GGUF file, in 4 bits (NF4), 8 bits, or as it is."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import nn

from distill.models.checkpoints import load_config, resolve
from distill.models.huggingface import HuggingFaceLanguageModel, load_pretrained

Quantization = Literal["nf4", "int8", "none"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_teacher(
    model: str,
    quantization: Quantization = "nf4",
    compute_dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> HuggingFaceLanguageModel:
    """The frozen teacher on `device`; its linear layers quantised, embeddings, norms and head in the compute dtype.

    A Hugging Face folder is quantised while it is read, so that the full weights never lie in memory together; a GGUF
    file is dequantised in host memory and then quantised layer by layer on the device.
    """
    dtype = resolve_dtype(compute_dtype, device)
    checkpoint = resolve(model, revision, trust_remote_code)
    _hush_bitsandbytes()
    if checkpoint.gguf_file is not None:
        loaded = load_pretrained(checkpoint, dtype, trust_remote_code=trust_remote_code)
        if quantization != "none":
            quantize_linears(loaded, quantization, dtype, device)
        loaded.to(device)
    elif quantization == "none":
        loaded = load_pretrained(checkpoint, dtype, None, {"": device}, trust_remote_code)
    else:
        already = getattr(load_config(checkpoint, trust_remote_code), "quantization_config", None)
        if already is not None:
            raise ValueError(f"{model} is quantized already: set quantization to 'none' to take it as it is")
        loaded = load_pretrained(checkpoint, dtype, _settings(quantization, dtype), {"": device}, trust_remote_code)
    _use_portable_kernel(loaded)
    teacher = HuggingFaceLanguageModel(loaded).eval().requires_grad_(False)
    teacher.check()
    return teacher


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """The compute dtype; `auto`: bfloat16 on CUDA cards that have it, float16 on older ones, float32 on a CPU."""
    if name != "auto":
        if name not in DTYPES:
            raise ValueError(f"compute_dtype '{name}' is unknown (known: auto, {', '.join(DTYPES)})")
        return DTYPES[name]
    if not device.startswith("cuda"):
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _settings(quantization: Quantization, dtype: torch.dtype) -> Any:
    import transformers

    if quantization == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def quantize_linears(model: Any, quantization: Quantization, dtype: torch.dtype, device: str) -> None:
    """Replace every linear layer but the head by a quantised one on `device`, one after the other, in place."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is head or not isinstance(child, (nn.Linear, Conv1D)):
                continue
            # GPT-2's Conv1D is a linear layer that keeps its weight transposed.
            weight = child.weight.data if isinstance(child, nn.Linear) else child.weight.data.t().contiguous()
            setattr(parent, name, _quantized(weight, child.bias, quantization, dtype).to(device))


def _quantized(
    weight: torch.Tensor, bias: nn.Parameter | None, quantization: Quantization, dtype: torch.dtype
) -> nn.Module:
    """A bitsandbytes layer that quantises its weight when it is moved to a device."""
    import bitsandbytes as bnb

    rows, columns = weight.shape
    layer: Any
    if quantization == "int8":
        layer = bnb.nn.Linear8bitLt(columns, rows, False, has_fp16_weights=False, threshold=6.0, device="meta")
        layer.weight = bnb.nn.Int8Params(weight, has_fp16_weights=False, requires_grad=False)
    else:
        layer = bnb.nn.Linear4bit(columns, rows, False, compute_dtype=dtype, quant_type="nf4", device="meta")
        layer.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
        )
    layer.bias = bias
    return layer


def _hush_bitsandbytes() -> None:
    """It warns at every product of every layer that int8 casts, and at import of a kernel that we do not use."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _use_portable_kernel(model: nn.Module) -> None:
    """Dequantise and multiply, on every CPU.

    On CPUs with AVX512-BF16 bitsandbytes would repack the weights for a kernel that is made for single tokens: at our
    batch sizes it takes twice as long, and it moves logits by up to 0.9, so that the machine decided the cache.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
