"""A teacher whose embedding, decoder layers and head are in memory one at a time, read when their turn comes.

Shapes: L sequence length, D hidden size.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distill.models.huggingface import HuggingFaceLanguageModel, quiet_transformers, transformation
from distill.models.language_model import Head

LAYER = re.compile(r"(?:^|(?<=\.))(layers|h|blocks)\.(\d+)\.")  # llama and its kin, gpt_neox: layers; gpt2: h
COMPUTED = "rotary_emb.inv_freq"  # early Llama checkpoints store what the model computes


class Source(Protocol):
    """Tensors by name, read when asked for: `distill.models.tensors`."""

    def names(self) -> list[str]: ...

    def read(self, name: str) -> Tensor: ...


def split_name(name: str) -> tuple[int | None, str]:
    """Return layer and name within it of a checkpoint's tensor; outside the layers, None and its name."""
    found = LAYER.search(name)
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


class StreamedTeacher:
    """A decoder of a llama-like family in float32: its last norm in memory, the rest on disk.

    The family's own code runs. Its forward is called once a sample with recorders in place of the layers, which gives
    the embeddings and each layer's masks and rotations (they keep documents packed in one row apart). Then the layers
    themselves are called with these, in any grouping.
    """

    def __init__(self, config: Any, source: Source, device: str = "cpu", trust_remote_code: bool = False) -> None:
        """Set up the teacher; `source` has a checkpoint's tensors. Raises ValueError if one is missing or unknown."""
        import accelerate
        import transformers

        config = copy.deepcopy(config)
        # Parameters without memory, but buffers (rotary frequencies, an embedding's scale) with their values.
        with quiet_transformers(), accelerate.init_empty_weights(include_buffers=False):
            self.model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            ).eval()
        self.device = torch.device(device)
        self._source = source
        self._names: dict[int | None, dict[str, str]] = {}  # of each layer, and outside them: name in module → stored
        for name in source.names():
            layer, local = split_name(name)
            if not local.endswith(COMPUTED):
                self._names.setdefault(layer, {})[local] = name
        base = self.model.base_model
        self._layers: list[nn.Module] = list(base.layers)
        self._recorders = [_Recorder() for _ in self._layers]
        base.layers = nn.ModuleList(self._recorders)
        self.norm: nn.Module = base.norm
        self._fill(self.norm, None, "norm.")
        base.rotary_emb.to(self.device)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._layers)

    @torch.no_grad()
    def begin(self, input_ids_BL: Tensor, position_ids_BL: Tensor) -> list[tuple[Tensor, list[LayerCall]]]:
        """Return, for each sample, the hidden states `[L, D]` that enter the first layer, and each layer's call."""
        model, begun = HuggingFaceLanguageModel(self.model), []
        with self._held(self.model.base_model.embed_tokens, None, "embed_tokens."):
            for ids_L, positions_L in zip(input_ids_BL, position_ids_BL, strict=True):
                model.body(ids_L[None].to(self.device), positions_L[None].to(self.device))
                begun.append((self._recorders[0].entered, [recorder.call for recorder in self._recorders]))
        return begun

    def layer(self, index: int) -> contextlib.AbstractContextManager[nn.Module]:
        """Give a layer its weights, for as long as the context lasts."""
        return self._held(self._layers[index], index)

    @contextlib.contextmanager
    def head(self) -> Iterator[Head]:
        """Give the output matrix (the embedding, if they are tied) its weights, for as long as the context lasts."""
        model = self.model
        tied = model.config.tie_word_embeddings
        module, name = (model.base_model.embed_tokens, "embed_tokens") if tied else (model.lm_head, "lm_head")
        with self._held(module, None, name + "."):
            yield Head(module.weight, None, **transformation(model.config))

    @contextlib.contextmanager
    def _held(self, module: nn.Module, layer: int | None, prefix: str = "") -> Iterator[nn.Module]:
        self._fill(module, layer, prefix)
        try:
            yield module
        finally:
            empty = {name: torch.empty_like(weight, device="meta") for name, weight in module.state_dict().items()}
            module.load_state_dict(empty, assign=True)  # `to("meta")` would lose the buffers' values too

    def _fill(self, module: nn.Module, layer: int | None, prefix: str = "") -> None:
        """Give a module its weights from disk, in float32."""
        stored = {
            local.removeprefix(prefix): name
            for local, name in self._names.get(layer, {}).items()
            if local.startswith(prefix)
        }
        weights = {local: self._source.read(name).to(self.device, torch.float32) for local, name in stored.items()}
        try:
            module.load_state_dict(weights, strict=True, assign=True)
        except RuntimeError as error:
            where = prefix.rstrip(".") or f"layer {layer}"
            raise ValueError(f"the checkpoint's {where} is not what its configuration says: {error}") from error
        module.to(self.device)
