"""The matrices of a model that are kept in few bits, those that cannot be, and a packed model from its tensors."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from distill.errors import UserError
from distill.models.checkpoints import Checkpoint, load_config
from distill.models.packed import PackedWeight, put, run_expert_by_expert
from distill.models.quantized_manifest import read_manifest
from distill.models.streaming import without_weights
from distill.models.traits import source_of_family
from distill.system.progress import say
from distill.system.units import size

Quantization = Literal["nf4", "int8", "none"]
MOST_LEFT = 0.1
"""Largest share of the matrices that may stay unquantised unasked."""
_OUTSIDE = (
    re.compile(r"self\.(\w+)\.weight\s*@"),
    re.compile(r"\bF\.linear\([^\n]*self\.(\w+)\.weight\b"),
    re.compile(r"self\.(\w+)\([\w.]+\.to\(self\.\1\.weight\.dtype\)\)"),
)


@dataclass
class Packing:
    """The ways in which a model's matrices are kept. Names are those of parameters in the model."""

    plain: list[str] = field(default_factory=list)
    """Weights of ordinary linear layers."""
    own: dict[str, int | None] = field(default_factory=dict)
    """Other weights that are packed in their place, with their number of slices (`PackedWeight`)."""
    shared: dict[str, str] = field(default_factory=dict)
    """Tied weights of these layers, and the names of those that they are."""
    kinds: set[str] = field(default_factory=set)
    """Kinds of weights in `own` and `shared`: experts, linear (layers of a family's own class), shared."""
    left: Counter[str] = field(default_factory=Counter)
    """Parameters of the matrices that stay as they are, by class and name."""
    packed: int = 0
    """Parameters in the matrices that are packed."""
    transposed: set[str] = field(default_factory=set)
    """Weights in `plain` that their layer (GPT-2's Conv1D) keeps transposed."""

    @property
    def share_left(self) -> float:
        left = sum(self.left.values())
        return left / max(left + self.packed, 1)

    def in_place(self) -> Packing:
        """Return the same packing with the weights of ordinary linear layers packed in their place too."""
        return replace(self, plain=[], own={**dict.fromkeys(self.plain), **self.own})

    def describe(self, quantization: str) -> str:
        """Return the quantisation as it really is, for fingerprints: `nf4`, or `nf4+experts`."""
        text = "+".join([quantization, *sorted(self.kinds)])
        return text if self.share_left <= MOST_LEFT else f"{text} but {self.share_left:.0%}"

    def check(self, name: str, quantization: str, dtype: torch.dtype, allow: bool) -> None:
        """Say what stays unquantised. Raises UserError if that is much, unless allowed."""
        if not self.left:
            return
        kind, count = self.left.most_common(1)[0]
        total = sum(self.left.values())
        text = (
            f"{name}: {size(total * dtype.itemsize)} of its matrices stay unquantised ({self.share_left:.1%}; "
            f"mostly {kind}, {size(count * dtype.itemsize)})"
        )
        if self.share_left > MOST_LEFT and not allow:
            raise UserError(
                f"{text}: more than {MOST_LEFT:.0%}, so it is not {quantization}: set "
                "teacher.options.allow_unquantized to true to take it so, or quantization to none"
            )
        if self.share_left > 0.001:
            say(text)


def packing_of(model: Any) -> Packing:
    """Return the way in which each matrix of a `transformers` model is kept, with or without weights.

    Embeddings, the head, and layers that a family keeps wide are not counted.
    """
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    found, head = Packing(), model.get_output_embeddings()
    skipped, tied = _skipped(model), getattr(model, "all_tied_weights_keys", None) or {}
    outside = {id(module) for module in model.modules() if isinstance(module, nn.Embedding) or module is head}
    sources = {source: target for target, source in tied.items()}
    for path, module in model.named_modules():
        if id(module) in outside:
            continue
        for name, parameter in module._parameters.items():
            full = f"{path}.{name}"
            if parameter is None or parameter.dim() < 2 or not parameter.is_floating_point() or "bias" in name:
                continue
            is_linear = isinstance(module, nn.Linear | Conv1D) and name == "weight"
            converts = is_linear and should_convert_module(path, skipped)
            if is_linear and (full in tied or full in sources):
                _share(found, model, full, tied)
            elif converts and (type(module) is nn.Linear or isinstance(module, Conv1D)):
                found.plain.append(full)
                if isinstance(module, Conv1D):
                    found.transposed.add(full)
            elif converts and "router" not in type(module).__name__.lower():
                found.own[full], found.kinds = None, found.kinds | {"linear"}
            elif holds_experts(module) and not isinstance(module, nn.Linear):
                found.own[full] = len(parameter) if parameter.dim() == 3 else None
                found.kinds.add("experts")
            else:
                found.left[f"{type(module).__name__}.{name}"] += parameter.numel()
                continue
            if full not in found.shared:
                found.packed += parameter.numel()
    return found


def _share(found: Packing, model: Any, full: str, tied: dict[str, str]) -> None:
    found.kinds.add("shared")
    if full in tied:
        found.shared[full] = tied[full]
    else:
        found.own[full] = None


def _skipped(model: Any) -> list[str]:
    """Return the modules that transformers leaves unquantised: it decided so for the caches that are there already."""
    from transformers.quantizers.base import HfQuantizer

    full = multiplied_outside(model.config)
    tied = {key.removesuffix(".weight") for pair in (model.all_tied_weights_keys or {}).items() for key in pair}
    skip = [*full, "lm_head"] if full else None  # None: transformers looks for the head itself
    found = HfQuantizer.get_modules_to_not_convert(model, skip, model._keep_in_fp32_modules)
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), "lm_head")
    return [*(set(found) - tied), head]


def multiplied_outside(config: Any) -> list[str]:
    """Return the layers whose weight a module looks at by itself: they cannot be packed.

    Mamba's mixer and LongCat's router multiply it, and the indexers of sparse attention cast hidden states to its type,
    which would be whole numbers.
    """
    source = source_of_family(config)
    return sorted({name for pattern in _OUTSIDE for name in pattern.findall(source)})


def holds_experts(module: nn.Module) -> bool:
    """Tell by a module's name whether it is one expert of a mixture, or several."""
    return "expert" in type(module).__name__.lower()


def pack_in_place(model: Any, packing: Packing, quantization: str, dtype: torch.dtype, device: Any = None) -> None:
    """Put packed weights without values in the places of `packing.own`, and let experts run one by one."""
    for full, slices in packing.own.items():
        path, _, name = full.rpartition(".")
        module = model.get_submodule(path)
        if full in packing.transposed:
            module = _as_linear(model, path)
        put(module, name, PackedWeight(module._parameters[name].shape, dtype, quantization, slices, device))
        run_expert_by_expert(module)
    for full, source in packing.shared.items():
        (path, _, name), (from_path, _, from_name) = full.rpartition("."), source.rpartition(".")
        put(model.get_submodule(path), name, getattr(model.get_submodule(from_path), from_name))


def _as_linear(model: Any, path: str) -> nn.Module:
    """Put an ordinary linear layer in the place of one that keeps its weight transposed."""
    old = model.get_submodule(path)
    columns, rows = old.weight.shape
    with torch.device("meta"):
        new = nn.Linear(columns, rows, bias=False)
    new.bias = old.bias
    model.set_submodule(path, new)
    return new


def described(checkpoint: Checkpoint, quantization: str, trust_remote_code: bool = False) -> str:
    """Return a checkpoint's quantisation as it really is, from its configuration."""
    if checkpoint.is_copy:
        return read_manifest(checkpoint.folder).as_it_is
    if quantization == "none":
        return quantization
    model = without_weights(load_config(checkpoint, trust_remote_code), torch.float32, trust_remote_code)
    return packing_of(model).describe(quantization)
