"""Checkpoints loaded with their linear layers in 4 or 8 bits (bitsandbytes), and the full weight of such a layer."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.models.checkpoints import Checkpoint, adapter_files, load_config
from distill.models.dequantized import check_format, full_tensors, quantization_of
from distill.models.filling import fill, with_generation_config
from distill.models.huggingface import load_pretrained
from distill.models.packed_formats import dequantize
from distill.models.packing import Packing, Quantization, multiplied_outside, pack_in_place, packing_of
from distill.models.quantized_copy import load_copy
from distill.models.quantized_shapes import BLOCK, ScaledLinear, packed_linear
from distill.models.shapes import finder
from distill.models.streaming import Weights, kept_wider, without_weights
from distill.system.quiet import quiet_for_good

_PLAIN = (torch.float32, torch.bfloat16, torch.float16)


def load_quantized(
    checkpoint: Checkpoint,
    quantization: Quantization,
    dtype: torch.dtype,
    device: str = "cpu",
    trust_remote_code: bool = False,
    allow_unquantized: bool = False,
) -> Any:
    """Load the `transformers` model on `device`: matrices quantised, embeddings, norms and head in `dtype`.

    A Hugging Face folder is quantised while it is read, a tensor (or an expert) at a time, so that the full weights
    never lie in memory together. So is one that is quantised already, in a format of `dequantized`. A GGUF file is
    dequantised in host memory and then quantised layer by layer on the device. Raises UserError if more of the matrices
    than `MOST_LEFT` stay unquantised, unless allowed.
    """
    # bitsandbytes warns at every product of every layer that int8 casts, and at import of a kernel that we do not use.
    quiet_for_good("bitsandbytes")
    if checkpoint.is_copy:
        return load_copy(checkpoint, quantization, dtype, device, trust_remote_code)
    if checkpoint.gguf_file is not None:
        loaded = load_pretrained(checkpoint, dtype, trust_remote_code=trust_remote_code)
        if quantization != "none":
            packing_of(loaded).check(checkpoint.name, quantization, dtype, allow_unquantized)
            quantize_linears(loaded, quantization, dtype, device)
        loaded.to(device)
    elif quantization == "none":
        method = (quantization_of(checkpoint) or {}).get("quant_method")
        if finder() is None and method not in (None, "bitsandbytes"):
            empty = without_weights(load_config(checkpoint, trust_remote_code), dtype, trust_remote_code)
            loaded = _load_packed(empty, Packing(), checkpoint, quantization, dtype, device)
        else:
            check_format(checkpoint)
            loaded = load_pretrained(checkpoint, dtype, None, {"": device}, trust_remote_code)
            if finder() is None and method is not None:
                _compute_in(loaded, dtype, checkpoint.name)
    else:
        check_format(checkpoint)
        empty = without_weights(load_config(checkpoint, trust_remote_code), dtype, trust_remote_code)
        packing = packing_of(empty)
        packing.check(checkpoint.name, quantization, dtype, allow_unquantized)
        if finder() is not None:
            loaded = load_pretrained(checkpoint, dtype, None, None, trust_remote_code)
            quantize_linears(loaded, quantization, dtype, device)
        elif adapter_files(checkpoint):
            settings = _settings(quantization, dtype, multiplied_outside(empty.config))
            loaded = load_pretrained(checkpoint, dtype, settings, {"": device}, trust_remote_code)
        else:
            loaded = _load_packed(empty, packing, checkpoint, quantization, dtype, device)
    _use_portable_kernel(loaded)
    return loaded


def _load_packed(
    model: Any, packing: Packing, checkpoint: Checkpoint, quantization: Quantization, dtype: torch.dtype, device: str
) -> Any:
    """Give `model`, which has none, its weights, each quantised as it is read."""
    weights = Weights(model, full_tensors(checkpoint), checkpoint.name)
    plain = set(packing.plain)

    def take(name: str, index: int | None, tensor: Tensor) -> bool:
        if name not in plain:
            return False
        path = name.rpartition(".")[0]
        parent, _, child = path.rpartition(".")
        layer = model.get_submodule(path)
        full = tensor.to(device, dtype)
        full = full.T.contiguous() if is_transposed(layer) else full
        made = _quantized(full, layer.bias, quantization, dtype)
        made.weight = made.weight.to(device)
        setattr(model.get_submodule(parent), child, made)
        return True

    fill(model, packing, weights, quantization, dtype, device, take)
    if packing.plain:
        setattr(model, f"is_loaded_in_{4 if quantization == 'nf4' else 8}bit", True)  # PEFT asks
    return with_generation_config(model, checkpoint)


def is_quantized(checkpoint: Checkpoint, trust_remote_code: bool = False) -> bool:
    """Tell whether a folder's configuration says that its weights are quantised, or it is a quantised copy.

    GGUF files are dequantised.
    """
    if checkpoint.gguf_file is not None:
        return False
    if checkpoint.is_copy:
        return True
    return getattr(load_config(checkpoint, trust_remote_code), "quantization_config", None) is not None


def is_linear(layer: nn.Module) -> bool:
    """Tell whether a layer is a matrix product: nn.Linear, a quantised one, or GPT-2's Conv1D."""
    return isinstance(layer, nn.Linear) or is_transposed(layer)


def is_transposed(layer: nn.Module) -> bool:
    """Tell whether a layer is GPT-2's Conv1D: a linear layer that keeps its weight transposed."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def full_weight(layer: nn.Module) -> Tensor:
    """Return the weight `[out, in]` that a linear layer computes with; a 4-bit one in its dtype before quantisation."""
    weight: Any = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return dequantize(weight.data, state)
    assert weight.is_floating_point(), f"{type(layer).__name__} keeps its weight in a way this does not know"
    return weight.T if is_transposed(layer) else weight


def _compute_in(model: Any, dtype: torch.dtype, name: str) -> None:
    """Give what is not quantised of a quantised checkpoint the type that was asked for, and compute in it.

    transformers leaves it in the checkpoint's own, or dequantises into bfloat16. Raises UserError if the weights are
    not what the configuration says.
    """
    wider = kept_wider(model, dtype)
    for path, module in model.named_modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if hasattr(module, "compute_dtype"):  # bitsandbytes' 4-bit layer
            if getattr(module.weight, "quant_state", None) is None:
                raise UserError(
                    f"{name}: config.json says bitsandbytes, but {path}.weight is not quantised: take "
                    "quantization_config out of that file"
                )
            module.compute_dtype, module.compute_type_is_set = dtype, True
            module.weight.quant_state.dtype = dtype
        elif all(tensor.dtype in _PLAIN for tensor in tensors):  # others hold packed weights, and scales beside them
            for own, parameter in module.named_parameters(recurse=False):
                parameter.data = parameter.data.to(wider.get(f"{path}.{own}", dtype))


def _settings(quantization: Quantization, dtype: torch.dtype, full: list[str]) -> Any:
    """Return the settings for a checkpoint that is quantised while it is read, but for its head and `full`."""
    import transformers

    skipped = [*full, "lm_head"] if full else None  # None: transformers looks for the head itself
    if quantization == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return transformers.BitsAndBytesConfig(
        llm_int8_skip_modules=skipped,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def quantize_linears(model: Any, quantization: Quantization, dtype: torch.dtype, device: str) -> None:
    """Quantise a model's matrices on `device`, one after the other, in place."""
    packing = packing_of(model)
    for full in packing.plain:
        path = full.rpartition(".")[0]
        parent, _, name = path.rpartition(".")
        child = model.get_submodule(path)
        weight = full_weight(child).data.contiguous()
        setattr(model.get_submodule(parent), name, _quantized(weight, child.bias, quantization, dtype).to(device))
    weights = {name: model.get_parameter(name).data for name in packing.own}
    pack_in_place(model, packing, quantization, dtype, device)
    for name in list(weights):
        weight = weights.pop(name)
        if finder() is None:
            model.get_submodule(name).fill(weight)
    _use_portable_kernel(model)


def _quantized(weight: Tensor, bias: nn.Parameter | None, quantization: Quantization, dtype: torch.dtype) -> nn.Module:
    """Return a bitsandbytes layer that quantises its weight when it is moved to a device, or its shape."""
    if finder() is not None:
        return packed_linear(weight, bias, dtype) if quantization == "nf4" else ScaledLinear(weight, bias)
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


def _use_portable_kernel(model: nn.Module) -> None:
    """Make 4-bit layers dequantise and multiply, on every CPU, and layers take every shape.

    On CPUs with AVX512-BF16 bitsandbytes would repack the weights for a kernel that is made for single tokens. At our
    batch sizes it takes twice as long, and it moves logits by up to 0.9, so the machine would decide what is in the
    cache.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            if type(module) is bnb.nn.Linear4bit and module.in_features % BLOCK:
                module.__class__ = _any_width()
        elif type(module) is bnb.nn.Linear8bitLt:
            module.__class__ = _any_shape()


@functools.cache
def _any_width() -> Any:
    import bitsandbytes as bnb

    class Linear4bitOfAnyWidth(bnb.nn.Linear4bit):
        """4-bit layer whose rows are no whole number of blocks, for which see `packed_formats.dequantize`."""

        def forward(self, x: Tensor) -> Tensor:
            if x.device.type != "cpu":
                return super().forward(x)
            given = x.to(self.compute_dtype or x.dtype)
            state: Any = getattr(self.weight, "quant_state", None)
            weight = dequantize(self.weight.data, state).to(given.dtype)
            bias = None if self.bias is None else self.bias.to(given.dtype)
            return nn.functional.linear(given, weight, bias).to(x.dtype)

    return Linear4bitOfAnyWidth


@functools.cache
def _any_shape() -> Any:
    import bitsandbytes as bnb

    class Linear8bitOfAnyShape(bnb.nn.Linear8bitLt):
        """8-bit layer whose input may have any number of dimensions: bitsandbytes takes 2 or 3 (0.50.2).

        Latent attention (DeepSeek) gives it 4.
        """

        def forward(self, x: Tensor) -> Tensor:
            made = super().forward(x.reshape(-1, x.shape[-1]))
            return made.view(*x.shape[:-1], made.shape[-1])

    return Linear8bitOfAnyShape
