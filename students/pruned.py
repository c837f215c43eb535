"""A student cut out of its teacher: some of the teacher's layers with their weights (depth pruning)."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor

from distill.models.checkpoints import load_config, resolve
from distill.models.huggingface import HuggingFaceLanguageModel, complain_about_missing, quiet
from distill.models.tensors import tensors

LAYER = re.compile(r"(?:^|(?<=\.))(layers|h|blocks)\.(\d+)\.")  # llama and its kin, gpt_neox: layers; gpt2: h


def prune_teacher(
    teacher: str, layers: int | list[int], revision: str | None = None, trust_remote_code: bool = False
) -> HuggingFaceLanguageModel:
    """The teacher with `layers` of its layers, in float32; embeddings, norms and head are its own.

    layers: how many, evenly spaced with the first and the last among them, or which ones, counted from 0.
    Only the tensors that are kept are read. `teacher` is supplied by the pipeline.
    """
    checkpoint = resolve(teacher, revision, trust_remote_code)
    config = load_config(checkpoint, trust_remote_code)
    if config.get_text_config() is not config:
        raise ValueError(f"{teacher} is multimodal: depth pruning knows text models only")
    if checkpoint.gguf_file is None and getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"the weights of {teacher} are quantized: set teacher to an unquantized copy to prune it")
    chosen = chosen_layers(layers, config.num_hidden_layers)
    weights = pruned_weights(tensors(checkpoint), chosen)
    student = HuggingFaceLanguageModel(_build(pruned_config(config, chosen), weights, teacher, trust_remote_code))
    student.check()
    return student


def chosen_layers(layers: int | list[int], total: int) -> list[int]:
    """Indices of the layers to keep, in ascending order."""
    if isinstance(layers, int):
        if not 1 <= layers <= total:
            raise ValueError(f"layers: {layers} is out of range; the teacher has {total} layers")
        gaps = max(layers - 1, 1)
        return [(2 * index * (total - 1) + gaps) // (2 * gaps) for index in range(layers)]  # rounded half up
    wrong = [index for index in layers if not 0 <= index < total]
    if wrong or not layers:
        raise ValueError(f"layers: {wrong or layers} out of range; the teacher's layers are 0 to {total - 1}")
    if len(set(layers)) != len(layers) or sorted(layers) != layers:
        raise ValueError(f"layers: {layers} must ascend, each layer once")
    return layers


def pruned_config(config: Any, chosen: list[int]) -> Any:
    """The teacher's configuration with fewer layers; lists with one entry a layer (`layer_types`) shrink alike."""
    total = config.num_hidden_layers
    pruned = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == total:
            setattr(pruned, name, [value[index] for index in chosen])
    pruned.num_hidden_layers = len(chosen)
    if hasattr(pruned, "quantization_config"):
        del pruned.quantization_config
    return pruned


def pruned_weights(source: Any, chosen: list[int]) -> dict[str, Tensor]:
    """The tensors to keep, under their new names; the others are not read."""
    renumbered = {old: new for new, old in enumerate(chosen)}
    kept: dict[str, Tensor] = {}
    for name in source.names():
        found = LAYER.search(name)
        if found is None:
            kept[name] = source.read(name)
        elif int(found[2]) in renumbered:
            kept[LAYER.sub(f"{found[1]}.{renumbered[int(found[2])]}.", name, count=1)] = source.read(name)
    return kept


def _build(config: Any, weights: dict[str, Tensor], teacher: str, trust_remote_code: bool) -> Any:
    """Load through transformers, which knows how a family's names on disk differ from those in memory."""
    import transformers

    with quiet():
        with torch.device("meta"):  # for its class only
            empty = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        model, report = type(empty).from_pretrained(
            None, config=config, state_dict=weights, dtype=torch.float32, output_loading_info=True
        )
    complain_about_missing(report, f"pruned {teacher}")
    return model
