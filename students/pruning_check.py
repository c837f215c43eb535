"""A student of fewer layers, compared with its teacher as the teacher's own code computes it without the others.

Shapes: L tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.streaming import place, without_weights
from students.pruning_stream import LAYER, layer_in

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
LENGTH = 12
TOLERANCE = 1e-3
"""Allowed ‖student − teacher‖ / ‖teacher‖ of the logits in float32."""


@torch.no_grad()
def check_against_teacher(student: HuggingFaceLanguageModel, whole: Any, chosen: list[int], trusts: bool) -> None:
    """Raise ValueError when the student is not the teacher without the layers that are not `chosen`.

    `whole` is the configuration of the student's widths with all layers. A family may compute by the number of a layer
    (its share of noise, its scale, a neighbour whose keys it borrows): such a layer is another one at another place.
    The teacher is made without memory, takes the student's own tensors, and passes over the other layers.
    """
    model = student.model
    teacher = without_weights(whole, torch.float32, trusts).eval()
    tuple_length = _outputs(student)
    weights = dict(model.state_dict(keep_vars=True))
    ids_L = torch.arange(LENGTH, device=student.head.weight_VD.device) * 7 % len(student.head.weight_VD)
    for name, wanted in teacher.state_dict().items():
        found = layer_in(name)
        if found is None:
            own = name
        elif int(found[2]) in chosen:
            own = LAYER.sub(rf"\g<1>.{chosen.index(int(found[2]))}.", name, count=1)
        else:
            continue
        if own in weights:
            tensor = weights[own].detach()
            if tensor.shape != wanted.shape:
                tensor = _spread(tensor, wanted.shape, whole, chosen, rows=int(ids_L.max()) + 1)
            place(teacher, name, tensor)
    for path, layer in list(teacher.named_modules()):
        found = LAYER.fullmatch(f"{path}.") or layer_in(f"{path}.")
        if found is not None and found.end() == len(path) + 1 and int(found[2]) not in chosen:
            layer.forward = _passing_over(tuple_length)
    family = type(model).__name__
    try:
        theirs_LV = _logits(HuggingFaceLanguageModel(teacher), ids_L)
    except Exception as error:  # the family's code looks at layers in a way of its own
        raise ValueError(
            f"{family} cannot be compared with its teacher without the other layers ({type(error).__name__}): whether "
            "its layers work at other places is unknown; take a student of another kind"
        ) from error
    ours_LV = _logits(student, ids_L)
    difference = torch.linalg.vector_norm(ours_LV - theirs_LV) / torch.linalg.vector_norm(theirs_LV)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{family} with layers {chosen} is not its teacher without the others (relative difference "
            f"{difference:.0e}): its layers compute by their number; keep all layers and prune the width, or take "
            "another student"
        )


def refuse_layers_elsewhere(names: Iterable[str], total: int, fewer: Any, trusts: bool) -> None:
    """Raise ValueError for a checkpoint that numbers tensors like its `total` layers outside of them.

    Renumbering the layers would leave these as they are, and give a layer another one's (Inkling 2's queries). A list
    that is as long in the model of `fewer` layers, a configuration, is of something else (Gemma 3n's streams).
    """
    found, example = _lists(names)
    for kind, count in found.items():
        if not max(total - 1, 2) <= count <= total:  # the first or last layer may have none
            continue
        if _lists(without_weights(fewer, torch.float32, trusts).state_dict())[0][kind] != count:
            raise ValueError(
                f"the checkpoint keeps parts of its layers outside of them ({example[kind]} and {count - 1} like it), "
                "and it is unknown which belong to the chosen ones: keep all layers and prune the width, or take "
                "another student"
            )


def _lists(names: Iterable[str]) -> tuple[Counter[str], dict[str, str]]:
    """Return the numbered tensors outside the layers by their name with N for the number: their count, and one name."""
    found: Counter[str] = Counter()
    example: dict[str, str] = {}
    for name in names:
        if layer_in(name) is None and (kind := _NUMBER.sub(".N", name, count=1)) != name:
            found[kind] += 1
            example[kind] = name
    return found, example


def _spread(tensor: Tensor, shape: torch.Size, whole: Any, chosen: list[int], rows: int) -> Tensor:
    """Return the inverse of `of_all_layers`, zero for the other layers; of an embedding a layer, the first `rows`."""
    size = getattr(whole, "hidden_size_per_layer_input", None) or 1
    places = (torch.tensor(chosen)[:, None] * size + torch.arange(size)).flatten().to(tensor.device)
    for dim, (length, wanted) in enumerate(zip(tensor.shape, shape, strict=True)):
        if length == len(places) and wanted == size * whole.num_hidden_layers:
            part = tensor[:rows] if dim == 1 and len(tensor) > wanted else tensor
            larger = [*part.shape]
            larger[dim] = wanted
            return tensor.new_zeros(larger).index_copy(dim, places, part)
    return tensor


def _logits(model: HuggingFaceLanguageModel, ids_L: Tensor) -> Tensor:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return model.head(model.body(ids_L[None], torch.arange(len(ids_L), device=ids_L.device)[None]))[0]
    finally:
        for module, mode in modes:
            module.training = mode


def _outputs(student: HuggingFaceLanguageModel) -> int:
    """Return how many values the student's first layer returns as a tuple; 0 for a tensor alone."""
    seen: list[int] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(len(output) if isinstance(output, tuple) else 0)

    for path, layer in student.model.named_modules():
        found = layer_in(f"{path}.")
        if found is not None and found.end() == len(path) + 1:
            handle = layer.register_forward_hook(look)
            break
    else:
        return 0
    try:
        _logits(student, torch.zeros(2, dtype=torch.long, device=student.head.weight_VD.device))
    finally:
        handle.remove()
    return seen[0] if seen else 0


def _passing_over(outputs: int) -> Callable[..., Any]:
    """Return the forward of a layer that is not there."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *[None] * (outputs - 1)) if outputs else hidden

    return forward


def counts_of_layers(config: Any, chosen: list[int]) -> dict[str, Any]:
    """Return the settings of a configuration that count or number its layers, for the `chosen` ones alone.

    They are in the order in which a configuration takes them.
    """
    total = config.num_hidden_layers
    found: dict[str, Any] = {}
    settings = config.to_dict()
    each = settings.pop("per_layer_config", None)  # Gemma 4: what differs in some layers, by their numbers
    for name, value in settings.items():
        if isinstance(value, list) and value and not name.endswith("token_id"):
            numbers = all(type(number) is int for number in value) and value == sorted(set(value))
            if numbers and ("layer" in name or "idx" in name) and value[0] >= 0 and value[-1] < total:
                found[name] = [chosen.index(number) for number in value if number in chosen]
            elif len(value) == total:
                found[name] = [copy.deepcopy(value[index]) for index in chosen]
        elif name in ("first_k_dense_replace", "num_dense_layers") and isinstance(value, int):
            found[name] = sum(index < value for index in chosen)
        elif name == "num_kv_shared_layers" and isinstance(value, int):
            found[name] = sum(index >= total - value for index in chosen)
    found["num_hidden_layers"] = len(chosen)
    if each is not None:
        found["per_layer_config"] = {chosen.index(int(key)): its for key, its in each.items() if int(key) in chosen}
    return found


def of_all_layers(tensor: Tensor, name: str, config: Any, chosen: list[int]) -> Tensor:
    """Return the chosen layers' part of a tensor that holds one for each: Gemma's embeddings a layer.

    `name` is the tensor's in its checkpoint. Any other tensor comes back as it is.
    """
    size = getattr(config, "hidden_size_per_layer_input", None)
    if not size or "per_layer" not in name or layer_in(name) is not None:
        return tensor
    whole = size * config.num_hidden_layers
    keep = (torch.tensor(chosen)[:, None] * size + torch.arange(size)).flatten().to(tensor.device)
    for dim, length in enumerate(tensor.shape):
        if length == whole:
            return tensor.index_select(dim, keep)
    return tensor
