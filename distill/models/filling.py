"""A model without weights that gets them from its checkpoint, each packed, cast or placed as it is read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from distill.errors import UserError
from distill.models.checkpoints import Checkpoint
from distill.models.huggingface import complain_about_missing, quiet_transformers
from distill.models.packed import PackedWeight
from distill.models.packing import Packing, pack_in_place
from distill.models.streaming import Weights, place, types_as_loaded
from distill.system.files import read_bounded

Take = Callable[[str, "int | None", Tensor], bool]
"""Name, number of the slice or None, and tensor -> True if it has been dealt with."""


@torch.no_grad()
def fill(
    model: Any,
    packing: Packing,
    weights: Weights,
    quantization: str,
    dtype: torch.dtype,
    device: str,
    take: Take = lambda name, index, tensor: False,
) -> None:
    """Read all weights of `model`, which has none, onto `device`. Raises UserError for those that are missing."""
    types = types_as_loaded(model, dtype)
    absent = without_own_value(model, weights.missing)
    names = _chosen(packing, types, weights.missing, weights.name)
    pack_in_place(model, packing, quantization, dtype, device)
    for name, index, tensor in weights.read_in_slices(names, packing.own):
        target = names[name]
        if target in packing.own:
            model.get_submodule(target).fill(tensor, index)
        elif not take(target, index, tensor):
            place(model, target, tensor.to(device, types[target]))
        del tensor
    tie(model, absent, [*packing.own, *packing.shared])
    complain_about_missing({"missing_keys": absent, "mismatched_keys": []}, weights.name)
    buffers_to(model, device)
    model.eval().requires_grad_(False)


def _chosen(packing: Packing, names: Collection[str], missing: Collection[str], checkpoint: str) -> dict[str, str]:
    """Return the names to read, and where each belongs: a shared weight may lie under the name of any of its users."""
    chosen = {name: name for name in names if name not in missing and name not in packing.shared}
    for name, source in packing.shared.items():
        if source not in chosen.values() and name not in missing:
            chosen[name] = source
    lost = [source for source in packing.shared.values() if source not in chosen.values()]
    if lost:
        raise UserError(f"{checkpoint}: the checkpoint lacks {lost[0]}")
    return chosen


def tie(model: Any, missing: set[str], packed: Collection[str]) -> None:
    """Tie what the family ties, and remove it from `missing`. Packed weights are shared already."""
    all_keys = model.all_tied_weights_keys
    kept = {target: source for target, source in all_keys.items() if not {target, source} & set(packed)}
    missing.difference_update(set(all_keys) - set(kept), *([set(all_keys.values()) - set(kept.values())]))
    model.all_tied_weights_keys = kept
    try:
        with quiet_transformers():
            model.tie_weights(missing_keys=missing, recompute_mapping=False)
    finally:
        model.all_tied_weights_keys = all_keys


def without_own_value(model: Any, missing: Collection[str]) -> set[str]:
    """Return those missing weights that the family needs: no buffers with a value, nothing that it says may miss."""
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    buffers = {name for name, buffer in model.named_buffers() if not buffer.is_meta}
    return {name for name in missing if name not in buffers and not any(p.search(name) for p in patterns)}


def buffers_to(model: Any, device: str) -> None:
    """Move the buffers that have memory."""
    for module in model.modules():
        if isinstance(module, PackedWeight):
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def with_generation_config(model: Any, checkpoint: Checkpoint) -> Any:
    """Give the model the checkpoint's settings of generation, if it has any."""
    import transformers

    file = checkpoint.folder / "generation_config.json"
    if file.is_file():
        with quiet_transformers():
            model.generation_config = transformers.GenerationConfig.from_dict(json.loads(read_bounded(file)))
    return model
