"""A teacher whose embedding, decoder layers and head are in memory one at a time, read when their turn comes.

Shapes: L sequence length, D hidden size.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.language_model import Head
from distill.models.streaming import Source, Weights, place, without_weights
from distill.models.text_part import sees
from distill.models.traits import transformation
from students.pruning_families import FAMILIES

LAYER = re.compile(r"(?:^|(?<=\.))(layers?|h|blocks)\.(\d+)\.")  # llama and its kin, gpt_neox: layers; gpt2: h; bert
COMPUTED = "rotary_emb.inv_freq"  # early Llama checkpoints store what the model computes


def layer_in(name: str) -> re.Match[str] | None:
    """Find the language model's layer in a tensor's or module's name. The groups are the list's name and the number."""
    found = LAYER.search(name)
    return None if found is None or sees(name[: found.start()]) else found


def split_name(name: str) -> tuple[int | None, str]:
    """Return layer and name within it of a checkpoint's tensor; outside the layers, None and its name."""
    found = layer_in(name)
    return (None, name.removeprefix("model.")) if found is None else (int(found[2]), name[found.end() :])


@dataclass(frozen=True)
class LayerCall:
    """The arguments of a layer besides the hidden states, from the model's own forward: mask, rotation, positions."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, layer: nn.Module, hidden_LD: Tensor) -> Tensor:
        """Return the layer's output `[L, D]`."""
        out = layer(hidden_LD[None], *self.args, **self.kwargs)
        return (out[0] if isinstance(out, tuple) else out)[0]


class _Recorder(nn.Module):
    """A module in place of a layer, which notes how it is called and passes the hidden states on."""

    call: LayerCall
    entered: Tensor

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.call, self.entered = LayerCall(args, kwargs), hidden_states[0]
        return hidden_states


class InMemory:
    """A checkpoint's tensors by their names in the model, whatever the checkpoint calls them: experts in one tensor."""

    def __init__(self, config: Any, source: Source, trust_remote_code: bool = False) -> None:
        """Look up the names. Raises ValueError for a tensor that has no place in the model."""
        model = without_weights(config, torch.float32, trust_remote_code)
        self._weights = Weights(model, source, "the teacher")
        refuse_unknown(self._weights)
        self._names = sorted(set(model.state_dict()) - self._weights.missing)

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return self._names

    def read(self, name: str) -> Tensor:
        """Return one tensor, in the type in which it is stored."""
        return next(self._weights.read([name]))[1]


def refuse_unknown(weights: Weights) -> None:
    """Raise ValueError for a tensor of a checkpoint that has no place in the model."""
    if unknown := [name for name in weights.unknown if not name.endswith(COMPUTED)]:
        raise ValueError(f"the checkpoint's {unknown[0]} has no place in its configuration")


class LayerwiseTeacher:
    """A decoder of a llama-like family in float32: its last norm in memory, the rest on disk.

    The family's own code runs. Its forward is called once a sample with recorders in place of the layers, which gives
    the embeddings and each layer's masks and rotations (they keep documents packed in one row apart). Then the layers
    themselves are called with these, in any grouping.
    """

    def __init__(self, config: Any, source: Source, device: str = "cpu", trust_remote_code: bool = False) -> None:
        """Set up the teacher; `source` has a checkpoint's tensors. Raises ValueError for one that has no place."""
        self.model = without_weights(config, torch.float32, trust_remote_code).eval()
        self.device = torch.device(device)
        self._weights = Weights(self.model, source, "the teacher")
        refuse_unknown(self._weights)
        base = self.model.base_model
        self._base = f"{self.model.base_model_prefix}."
        self._layers: list[nn.Module] = list(base.layers)
        self._recorders = [_Recorder() for _ in self._layers]
        base.layers = nn.ModuleList(self._recorders)
        known = FAMILIES[config.model_type]
        last = next(name for name, _ in base.named_children() if known.axes_of(f"{name}.weight") == "D")
        self.norm: nn.Module = base.get_submodule(last)
        self._fill(self.norm, f"{self._base}{last}.")
        # The embeddings, and the modules that compute from positions alone.
        self._first = {name: module for name, module in base.named_children() if name not in ("layers", last)}

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._layers)

    @torch.no_grad()
    def begin(self, input_ids_BL: Tensor, position_ids_BL: Tensor) -> list[tuple[Tensor, list[LayerCall]]]:
        """Return, for each sample, the hidden states `[L, D]` that enter the first layer, and each layer's call."""
        model, begun = HuggingFaceLanguageModel(self.model), []
        with contextlib.ExitStack() as stack:
            for name, module in self._first.items():
                stack.enter_context(self._held(module, f"{self._base}{name}."))
            for ids_L, positions_L in zip(input_ids_BL, position_ids_BL, strict=True):
                model.body(ids_L[None].to(self.device), positions_L[None].to(self.device))
                begun.append((self._recorders[0].entered, [recorder.call for recorder in self._recorders]))
        return begun

    def layer(self, index: int) -> contextlib.AbstractContextManager[nn.Module]:
        """Give a layer its weights, for as long as the context lasts."""
        return self._held(self._layers[index], f"{self._base}layers.{index}.")

    @contextlib.contextmanager
    def head(self) -> Iterator[Head]:
        """Give the output matrix (the embedding, if they are tied) its weights, for as long as the context lasts."""
        model = self.model
        tied = model.config.tie_word_embeddings
        module, prefix = (
            (model.base_model.embed_tokens, self._base + "embed_tokens.") if tied else (model.lm_head, "lm_head.")
        )
        with self._held(module, prefix):
            yield Head(module.weight, None, **transformation(model.config))

    @contextlib.contextmanager
    def _held(self, module: nn.Module, prefix: str) -> Iterator[nn.Module]:
        self._fill(module, prefix)
        try:
            yield module
        finally:
            for name, weight in module.state_dict().items():  # `to("meta")` would lose the buffers' values too
                place(module, name, torch.empty_like(weight, device="meta"))

    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Give a module, whose weights' names begin with `prefix`, its weights from disk, in float32."""
        for name, tensor in self._weights.read([prefix + name for name in module.state_dict()]):
            place(module, name.removeprefix(prefix), tensor.to(self.device, torch.float32))
            del tensor
        module.to(self.device)
