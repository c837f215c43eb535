"""Width pruning: the rows and columns of each of a teacher's tensors that a narrower student keeps.

Shapes: I layers, D hidden size, G key-value groups, F neurons of an MLP, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distill.models.traits import neurons
from students.pruning_families import CHOSEN, EXPERTS, FAMILIES, setting

GROUPED = 8
"""Channels whose bytes torch's product of all experts at once aligns, in 16 bits."""


@dataclass(frozen=True)
class Widths:
    """The sizes of a decoder that width pruning changes, and those that it leaves as they are."""

    hidden: int
    groups: int
    """Number of key-value heads. Each goes with the query heads that share it."""
    intermediate: int
    heads_per_group: int
    head: int
    experts: int = 0
    """Number of experts of a layer; 0 if the family has none."""

    @classmethod
    def of(cls, config: Any) -> Widths:
        """Return the sizes in a configuration of one of `FAMILIES`."""
        heads, hidden = config.num_attention_heads, config.hidden_size
        own = vars(config)  # Gemma 4 forbids to ask for these, because they differ between its layers
        groups = own.get("num_key_value_heads") or heads
        head = own.get("head_dim") or hidden // heads
        name = setting(config, EXPERTS) if FAMILIES[config.model_type].is_mixture else None
        experts = 0 if name is None else getattr(config, name)
        return cls(hidden, groups, neurons(config), heads // groups, head, experts)

    def as_config(self, config: Any) -> dict[str, Any]:
        """Return the sizes that differ from a configuration's, under its names, and those that no longer follow."""
        before = Widths.of(config)
        changed: dict[str, Any] = {}
        if self.hidden != before.hidden:
            changed["hidden_size"] = self.hidden
        if self.intermediate != before.intermediate:
            changed["intermediate_size"] = self.intermediate
            if hasattr(config, "block_auto_adjust_ff_dim"):
                changed["block_auto_adjust_ff_dim"] = False
        if self.groups != before.groups:
            changed["num_attention_heads"] = self.groups * self.heads_per_group
            changed["num_key_value_heads"] = self.groups
        if (self.hidden, self.groups) != (before.hidden, before.groups) and not hasattr(config, "qk_rope_head_dim"):
            changed["head_dim"] = self.head
        if self.experts != before.experts:
            changed[str(setting(config, EXPERTS))] = self.experts
        return changed

    def axes(self) -> dict[str, int]:
        """Return the length of each axis."""
        keys = self.groups * self.head
        queries = keys * self.heads_per_group
        return {
            "D": self.hidden,
            "Q": queries,
            "H": self.groups * self.heads_per_group,
            "W": 2 * queries,
            "K": keys,
            "P": queries + 2 * keys,
            "F": self.intermediate,
            "U": 2 * self.intermediate,
            "E": self.experts,
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
    experts: list[Tensor] | None = None
    """Experts of each of the teacher's layers."""

    def slice(self, tensor: Tensor, name: str, layer: int | None) -> Tensor:
        """Return the slice of a tensor to keep. `name` is its name within its layer, or the model (`layer` None).

        Raises ValueError for a tensor that the family is not known to have, or whose shape differs from the
        configuration's.
        """
        axes = FAMILIES[self.family].axes_of(name)
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
        assert layer is not None, "only a layer's tensors have heads, neurons and experts"
        if axis == "E":
            return None if self.experts is None else self.experts[layer]
        if axis in "FU":
            if self.neurons is None:
                return None
            keep = self.neurons[layer]
            return keep if axis == "F" else torch.cat([keep, keep + self.teacher.intermediate])
        if self.groups is None:
            return None
        heads = rows_of(self.groups[layer], self.teacher.heads_per_group)
        if axis in "HW":
            return heads if axis == "H" else rows_of(heads, 2 * self.teacher.head)
        keys = rows_of(self.groups[layer], self.teacher.head)
        queries = rows_of(heads, self.teacher.head)
        if axis == "P":
            all_queries, all_keys = self.teacher.axes()["Q"], self.teacher.axes()["K"]
            return torch.cat([queries, keys + all_queries, keys + all_queries + all_keys])
        return queries if axis == "Q" else keys


def narrowed_widths(config: Any, **sizes: int | None) -> Widths:
    """Return the student's widths, of `hidden_size`, `intermediate_size`, `key_value_groups` and `experts`.

    One that is None or not given stays the teacher's. Raises ValueError for widths that the teacher cannot give.
    """
    family = config.model_type
    if family not in FAMILIES:
        raise ValueError(
            f"width, and depth by importance, are not known for {family} (known: {', '.join(FAMILIES)}): "
            "prune it to evenly spaced or chosen layers"
        )
    if getattr(config, "num_kv_shared_layers", None):
        raise ValueError(f"width, and depth by importance, are not known where layers of {family} borrow others' keys")
    if getattr(config, "enable_moe_block", False):
        raise ValueError(f"width, and depth by importance, are not known for {family} with experts")
    teacher = Widths.of(config)
    limits = {
        "hidden_size": teacher.hidden,
        "intermediate_size": teacher.intermediate,
        "key_value_groups": teacher.groups,
        "experts": teacher.experts,
    }
    asked = {name: limit if (size := sizes.get(name)) is None else size for name, limit in limits.items()}
    for name, limit in limits.items():
        if asked[name] == limit:
            continue
        if name == "experts" and not limit:
            raise ValueError(f"experts: {family} has none")
        reason = FAMILIES[family].fixed.get(name)
        if reason is not None:
            raise ValueError(f"{name}: {family} cannot change it: {reason}")
        least = _least(config, name)
        if not least <= asked[name] <= limit:
            raise ValueError(
                f"{name}: {asked[name]} is out of range; the teacher has {limit}, so {least} to {limit}"
                + (" (each token takes that many)" if least > 1 else "")
            )
    hidden = asked["hidden_size"]
    if teacher.experts and hidden < teacher.hidden and hidden % GROUPED:
        raise ValueError(f"hidden_size: {hidden} is no multiple of {GROUPED}, which {family}'s experts need")
    if asked["experts"] < teacher.experts and (getattr(config, "n_group", None) or 1) > 1:
        raise ValueError(f"experts: this {family} chooses experts by groups of them: leave them as they are")
    return replace(
        teacher,
        hidden=hidden,
        intermediate=asked["intermediate_size"],
        groups=asked["key_value_groups"],
        experts=asked["experts"],
    )


def _least(config: Any, name: str) -> int:
    """Return the smallest size: of the experts, as many as a token is given to."""
    chosen = setting(config, CHOSEN) if name == "experts" else None
    return 1 if chosen is None else int(getattr(config, chosen))


def rows_of(indices: Tensor, size: int) -> Tensor:
    """Return the indices of the rows of groups of `size` rows each: `rows_of([0, 2], 3)` is `[0, 1, 2, 6, 7, 8]`."""
    return (indices[:, None] * size + torch.arange(size)).flatten()


def largest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` largest scores, in ascending order. Ties go to the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values
