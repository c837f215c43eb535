"""Width pruning: the rows and columns of each of a teacher's tensors that a narrower student keeps.

Shapes: I layers, D hidden size, G key-value groups, F neurons of an MLP, E size of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "granite", "olmo2", "phi3", "gemma2", "gemma3_text")
"""Families (`model_type`) whose tensors `AXES` names."""
FIXED_HIDDEN = ("gemma2", "gemma3_text")
"""Families that derive a constant (the embedding's scale) from the hidden size, which must not change therefore."""

# What each dimension of a tensor counts: D channels of the hidden size, Q rows of all query heads, K rows of all
# key-value heads, F neurons of the MLP, P the rows of query, key and value in one matrix, U those of gate and up.
# A dot: a dimension that no pruning touches.
AXES = {
    "embed_tokens.weight": ".D",
    "lm_head.weight": ".D",
    "norm.weight": "D",
    "input_layernorm.weight": "D",
    "post_attention_layernorm.weight": "D",
    "pre_feedforward_layernorm.weight": "D",
    "post_feedforward_layernorm.weight": "D",
    "self_attn.q_proj.weight": "QD",
    "self_attn.q_proj.bias": "Q",
    "self_attn.k_proj.weight": "KD",
    "self_attn.k_proj.bias": "K",
    "self_attn.v_proj.weight": "KD",
    "self_attn.v_proj.bias": "K",
    "self_attn.qkv_proj.weight": "PD",
    "self_attn.o_proj.weight": "DQ",
    "self_attn.o_proj.bias": "D",
    "self_attn.q_norm.weight": ".",
    "self_attn.k_norm.weight": ".",
    "mlp.gate_proj.weight": "FD",
    "mlp.gate_proj.bias": "F",
    "mlp.up_proj.weight": "FD",
    "mlp.up_proj.bias": "F",
    "mlp.gate_up_proj.weight": "UD",
    "mlp.down_proj.weight": "DF",
    "mlp.down_proj.bias": "D",
}
# OLMo 2 normalises all heads as one vector.
AXES_OF_FAMILY = {"olmo2": {"self_attn.q_norm.weight": "Q", "self_attn.k_norm.weight": "K"}}


@dataclass(frozen=True)
class Widths:
    """The sizes of a decoder that width pruning changes, and the two that it leaves as they are."""

    hidden: int
    groups: int
    """Number of key-value heads. Each goes with the query heads that share it."""
    intermediate: int
    heads_per_group: int
    head: int

    @classmethod
    def of(cls, config: Any) -> Widths:
        """Return the sizes in a configuration of one of `FAMILIES`."""
        heads, hidden = config.num_attention_heads, config.hidden_size
        groups = getattr(config, "num_key_value_heads", None) or heads
        head = getattr(config, "head_dim", None) or hidden // heads
        return cls(hidden, groups, config.intermediate_size, heads // groups, head)

    def as_config(self) -> dict[str, int]:
        """Return the sizes under their names in configurations, with the head size, which no longer follows."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.groups * self.heads_per_group,
            "num_key_value_heads": self.groups,
            "head_dim": self.head,
        }

    def axes(self) -> dict[str, int]:
        """Return the length of each axis of `AXES`."""
        keys = self.groups * self.head
        queries = keys * self.heads_per_group
        return {
            "D": self.hidden,
            "Q": queries,
            "K": keys,
            "P": queries + 2 * keys,
            "F": self.intermediate,
            "U": 2 * self.intermediate,
        }


@dataclass(frozen=True)
class Narrowing:
    """The teacher's width that a student keeps: ascending indices, None for everything."""

    family: str
    teacher: Widths
    hidden: Tensor | None = None
    """Channels, the same ones everywhere, because all layers read and write one residual stream."""
    groups: list[Tensor] | None = None
    """Key-value groups of each of the teacher's layers."""
    neurons: list[Tensor] | None = None
    """Neurons of the MLP of each of the teacher's layers."""

    def slice(self, tensor: Tensor, name: str, layer: int | None) -> Tensor:
        """Return the slice of a tensor to keep. `name` is its name within its layer, or the model (`layer` None).

        Raises ValueError for a tensor that `AXES` does not know, or whose shape differs from the configuration's.
        """
        axes = AXES_OF_FAMILY.get(self.family, {}).get(name) or AXES.get(name)
        if axes is None or len(axes) != tensor.dim():
            raise ValueError(f"width pruning does not know the tensor {name} {tuple(tensor.shape)} of {self.family}")
        lengths = self.teacher.axes()
        for dim, axis in enumerate(axes):
            if axis == ".":
                continue
            if tensor.shape[dim] != lengths[axis]:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; its configuration says {lengths[axis]}")
            keep = self._kept(axis, layer)
            if keep is not None:
                tensor = tensor.index_select(dim, keep)
        return tensor

    def _kept(self, axis: str, layer: int | None) -> Tensor | None:
        """Return the indices to keep along an axis, None for all."""
        if axis == "D":
            return self.hidden
        assert layer is not None, "only a layer's tensors have heads and neurons"
        if axis in "FU":
            if self.neurons is None:
                return None
            keep = self.neurons[layer]
            return keep if axis == "F" else torch.cat([keep, keep + self.teacher.intermediate])
        if self.groups is None:
            return None
        keys = rows_of(self.groups[layer], self.teacher.head)
        queries = rows_of(self.groups[layer], self.teacher.head * self.teacher.heads_per_group)
        if axis == "P":
            all_queries, all_keys = self.teacher.axes()["Q"], self.teacher.axes()["K"]
            return torch.cat([queries, keys + all_queries, keys + all_queries + all_keys])
        return queries if axis == "Q" else keys


def narrowed_widths(
    config: Any, hidden_size: int | None, intermediate_size: int | None, key_value_groups: int | None
) -> Widths:
    """Return the student's widths; None stays the teacher's. Raises ValueError for widths the teacher cannot give."""
    family = config.model_type
    if family not in FAMILIES:
        raise ValueError(
            f"width, and depth by importance, are not known for {family} (known: {', '.join(FAMILIES)}): "
            "prune it to evenly spaced or chosen layers"
        )
    teacher = Widths.of(config)
    asked = {
        "hidden_size": (hidden_size, teacher.hidden),
        "intermediate_size": (intermediate_size, teacher.intermediate),
        "key_value_groups": (key_value_groups, teacher.groups),
    }
    for name, (size, limit) in asked.items():
        if size is not None and not 1 <= size <= limit:
            raise ValueError(f"{name}: {size} is out of range; the teacher has {limit}, so 1 to {limit}")
    hidden, intermediate, groups = (limit if size is None else size for size, limit in asked.values())
    if hidden < teacher.hidden and family in FIXED_HIDDEN:
        raise ValueError(f"hidden_size: {family} scales its embedding by its hidden size: leave that as it is")
    return replace(teacher, hidden=hidden, intermediate=intermediate, groups=groups)


def rows_of(indices: Tensor, size: int) -> Tensor:
    """Return the indices of the rows of groups of `size` rows each: `rows_of([0, 2], 3)` is `[0, 1, 2, 6, 7, 8]`."""
    return (indices[:, None] * size + torch.arange(size)).flatten()


def largest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` largest scores, in ascending order. Ties go to the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values
