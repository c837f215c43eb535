"""A pretrained student that learns through low-rank adapters: LoRA (Hu et al. 2021), QLoRA (Dettmers et al. 2023).

Shapes: O outputs, I inputs of a linear layer.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.models.checkpoints import nearest, refuse_adapter, resolve
from distill.models.dequantized import check_format
from distill.models.devices import DTYPES
from distill.models.huggingface import (
    HuggingFaceLanguageModel,
    from_weights,
    shape_of,
)
from distill.models.language_model import check_rows
from distill.models.quantization import full_weight, is_linear, is_quantized, is_transposed, load_quantized
from distill.models.shapes import declare, finder

NAME = "default"  # name of a layer's one adapter


@declare(pretrained="model")
def load_lora_student(
    model: str,
    rank: int = 16,
    lora_alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Literal["all-linear"] | list[str] = "all-linear",
    quantization: Literal["none", "nf4"] = "none",
    base_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    vocab_size: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoraLanguageModel:
    """Load the frozen `model` with trainable float32 adapters, which change nothing at first. Seed torch before.

    rank, lora_alpha, dropout: an adapted layer adds `lora_alpha / rank * B(A(dropout(x)))`; lora_alpha: 2 * rank.
    target_modules: names of the linear layers to adapt, such as [q_proj, v_proj]; all-linear: all but the head. A
    mixture's experts get none, nor do layers whose weight another module reads by itself (Mamba's out_proj).
    quantization: the frozen linear layers unquantised, or in 4 bits (QLoRA). base_dtype: the frozen weights' type (nf4:
    that of the rest and of the products). A mixed train.precision computes in 16 bits anyway, so a frozen float32 copy
    only costs memory. For train.precision 32-true give float32. export_dtype: type of the merged weights. 16 bits halve
    the folder and round the finest changes away. `vocab_size` is supplied by the pipeline.
    """
    _check_numbers(rank, lora_alpha, dropout)
    checkpoint = resolve(model, revision, trust_remote_code)
    refuse_adapter(checkpoint)
    check_format(checkpoint)
    if is_quantized(checkpoint, trust_remote_code):
        raise ValueError(f"the weights of {model} are quantized already: set model to an unquantized copy")
    loaded = load_quantized(checkpoint, quantization, DTYPES[base_dtype], trust_remote_code=trust_remote_code)
    notes = untouched(loaded, chosen_layers(loaded, target_modules))
    add_adapters(loaded, target_modules, rank, 2.0 * rank if lora_alpha is None else lora_alpha, dropout)
    student = LoraLanguageModel(loaded, DTYPES[export_dtype])
    student.notes = notes
    if vocab_size is not None:
        check_rows(student.head.weight_VD.shape[0], vocab_size)
    student.check()
    return student


class LoraLanguageModel(HuggingFaceLanguageModel):
    """A Hugging Face model with adapters in it, which leaves the pipeline as an ordinary model: merged."""

    def __init__(self, model: Any, export_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(model)
        self.export_dtype = export_dtype
        self.notes: list[str] = []
        """Lines for the user: the pipeline says them when it begins with the student."""

    def not_cast(self) -> Iterable[Tensor]:
        """Return the adapters too, which stay float32: train.precision bf16-true is for the weights under them."""
        return [*super().not_cast(), *(parameter for parameter in self.parameters() if parameter.requires_grad)]

    @torch.no_grad()
    def merged(self) -> HuggingFaceLanguageModel:
        """Return a separate model in host memory, adapters added to the weights and 4-bit weights dequantised.

        This model does not change, and neither does torch's random state.
        """
        config = copy.deepcopy(self.model.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        if finder() is not None:
            return HuggingFaceLanguageModel(shape_of(config, self.export_dtype))
        with torch.device("meta"):  # for its names only
            empty = type(self.model)(copy.deepcopy(config))
        weights = {name: self._merged_tensor(name, empty).to("cpu", copy=True) for name in empty.state_dict()}
        plain = from_weights(type(self.model), config, weights, self.export_dtype, "merged student")
        plain.generation_config = copy.deepcopy(self.model.generation_config)
        return HuggingFaceLanguageModel(plain)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the merged model as an ordinary Hugging Face folder, which needs no peft."""
        self.merged().save_pretrained(folder)

    def _merged_tensor(self, name: str, empty: nn.Module) -> Tensor:
        """Return the plain model's tensor `name`, with the adapter of its layer added if there is one."""
        parent, _, leaf = name.rpartition(".")
        layer, adapter = self.model.get_submodule(parent), None
        if hasattr(layer, "get_base_layer"):
            layer, adapter = layer.get_base_layer(), layer
        if leaf != "weight" or not is_linear(layer):
            tensor = getattr(layer, leaf).detach()
            return tensor.to(self.export_dtype) if tensor.is_floating_point() else tensor
        weight_OI = full_weight(layer).float()
        if adapter is not None:
            product_OI = adapter.lora_B[NAME].weight.float() @ adapter.lora_A[NAME].weight.float()
            weight_OI = weight_OI + adapter.scaling[NAME] * product_OI
        # The plain layer may keep its weight transposed, even if the quantised layer does not.
        weight = weight_OI.T if is_transposed(empty.get_submodule(parent)) else weight_OI
        return weight.to(self.export_dtype).contiguous()


def add_adapters(
    model: Any, target_modules: Literal["all-linear"] | list[str], rank: int, lora_alpha: float, dropout: float
) -> None:
    """Freeze a `transformers` model and put float32 adapters into the chosen linear layers, in place."""
    import peft

    chosen = chosen_layers(model, target_modules)
    layers = [model.get_submodule(name) for name in chosen]
    # In a plain module PEFT adapts the chosen layers and no others. Where it knows the family, it would take the names
    # of a mixture's shared expert for those of all its experts, whose adapters no layer's merge would find.
    plain: Any = nn.ModuleDict({"model": model})
    plain.is_loaded_in_4bit = any(hasattr(layer.weight, "quant_state") for layer in layers)  # peft asks this
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=lora_alpha,  # type: ignore[arg-type]  # a fraction works as well
        lora_dropout=dropout,
        target_modules=[f"model.{name}" for name in chosen],
        fan_in_fan_out=any(is_transposed(layer) for layer in layers),
    )
    model.requires_grad_(False)
    peft.inject_adapter_in_model(config, plain, NAME)
    for parameter in model.parameters():
        if parameter.requires_grad:  # adapters are small, and 16 bits would round their updates away
            parameter.data = parameter.data.float()


def chosen_layers(model: Any, target_modules: Literal["all-linear"] | list[str]) -> list[str]:
    """Return the full names of the layers to adapt, without the head. Raises ValueError for an unknown name.

    Layers that an adapter would not reach, or break, are left out: see `_is_adaptable`.
    """
    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if is_linear(module) and module is not head and _is_adaptable(model, name, module)
    ]
    if target_modules == "all-linear":
        return linear
    for target in target_modules:
        if not any(_ends_with(name, target) for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            near = nearest(target, known)
            raise ValueError(f"target_modules: no linear layer '{target}'{near} (known: {', '.join(known)})")
    if not target_modules:
        raise ValueError("target_modules: none given, so that nothing would learn; all-linear takes all")
    return [name for name in linear if any(_ends_with(name, target) for target in target_modules)]


def _is_adaptable(model: Any, name: str, layer: nn.Module) -> bool:
    """Tell whether a linear layer makes its product itself, and only that.

    A module around it may read its weight (Mamba's mixers hand it to a kernel), which would pass its adapter by. A
    router that is a linear layer returns its choice besides.
    """
    owner, _, leaf = name.rpartition(".")
    around: Any = type(model.get_submodule(owner))
    if re.search(rf"self\.{re.escape(leaf)}\.weight\b", _source(around)):
        return False
    own = type(layer).__module__.startswith("transformers.models.") and type(layer).forward is not nn.Linear.forward
    return not own or _multiplies(layer)


@torch.no_grad()
def _multiplies(layer: Any) -> bool:
    """Tell whether a linear layer of a family's own class makes the product of its input and its weight, and only that.

    DeepSeek V4's, for one, multiplies each group of heads by its own part of the weight.
    """
    given = torch.ones(1, 3, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
    try:
        made = layer(given)
    except (RuntimeError, TypeError):
        return False
    wanted = nn.functional.linear(given, layer.weight, layer.bias)
    if not isinstance(made, Tensor) or made.shape != wanted.shape:
        return False
    return finder() is not None or torch.allclose(made, wanted, rtol=0.05, atol=1e-3)


@functools.cache
def _source(family: Any) -> str:
    try:
        return inspect.getsource(family)
    except (OSError, TypeError):  # a checkpoint's own code that is not there as text
        return ""


def untouched(model: Any, chosen: list[str]) -> list[str]:
    """Return lines about the weights of a mixture that get no adapter: its experts are no linear layers."""
    stacked = sum(weight.numel() for _, weight in model.named_parameters() if weight.dim() == 3)
    total = sum(weight.numel() for weight in model.parameters())
    share = stacked / max(total, 1)
    if share < 0.1:
        return []
    return [f"experts get no adapters ({share:.0%} of the weights); {len(chosen)} other layers do"]


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _check_numbers(rank: int, lora_alpha: float | None, dropout: float) -> None:
    """Raise ValueError for a number out of range. It becomes one short message to the user."""
    if rank < 1:
        raise ValueError(f"rank: {rank} is not at least 1")
    if lora_alpha is not None and not lora_alpha > 0:
        raise ValueError(f"lora_alpha: {lora_alpha} is not above 0")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: {dropout} is not from 0 to below 1")
