"""Checkpoints of published shapes with random weights: real sizes and times without a download."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from distill.forecast.published import published_models
from distill.models import checkpoints, tokenizers

SHARD_BYTES = 4_000_000_000
TABLE = 1 << 24
"""Random numbers that all weights are slices of."""
TINY = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16},
    "num_key_value_heads": 2,
}


def write_checkpoint(name: str, folder: Path, tiny: bool = False) -> Path:
    """Write the model of a hub name into `folder`, unless it is there, and return its folder."""
    place = folder / name.replace("/", "--")
    if place.exists():
        return place
    published = published_models()[name]
    config = {**published.config, **(TINY if tiny else {})}
    if tiny and "layer_types" in config:
        config["layer_types"] = config["layer_types"][: TINY["num_hidden_layers"]]
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}), encoding="utf-8")
    _write_tokenizer(place, published.tokens)
    _write_weights(place)
    return place


def _write_tokenizer(place: Path, tokens: int) -> None:
    """Write the demo's tokenizer, with tokens that no text has until there are `tokens`."""
    tokenizer = tokenizers.load_tokenizer(checkpoints.resolve("smollm2-135m-demo"))
    tokenizer.save_pretrained(place)
    file = place / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = content["model"]["vocab"]
    last = max([*vocabulary.values(), *(token["id"] for token in content["added_tokens"])])
    vocabulary.update({f"unused {number}": number for number in range(last + 1, tokens)})
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _write_weights(place: Path) -> None:
    import transformers

    config = transformers.AutoConfig.from_pretrained(place)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
    files, index = list(_shards(shapes)), {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        save_file(dict(_weights(names, shapes)), place / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(names, file))
    text = json.dumps({"metadata": {}, "weight_map": index})
    (place / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _shards(shapes: dict[str, torch.Size]) -> Iterator[list[str]]:
    """Yield the names of each file's tensors."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + 2 * shape.numel() > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += 2 * shape.numel()
    yield names


def _weights(names: list[str], shapes: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor: ones for a norm, else repetitions of one random table."""
    table = (0.02 * torch.randn(TABLE, generator=torch.Generator().manual_seed(0))).bfloat16()
    for name in names:
        shape = shapes[name]
        if len(shape) == 1:
            yield name, torch.ones(shape, dtype=torch.bfloat16)
            continue
        flat = table.repeat(-(-shape.numel() // TABLE))[: shape.numel()]
        yield name, flat.clone().view(shape)
