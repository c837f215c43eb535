"""The teacher's head beside the shards of a cache of hidden states: one safetensors file that carries its own hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from distill.cache.format import checks
from distill.errors import UserError
from distill.models.language_model import Head
from distill.system.files import write_durably

HEAD = "head.safetensors"
_VALUES: dict[str, checks.Check] = {
    "scale": checks.positive,
    "soft_cap": lambda value: value is None or checks.positive(value),
}


def save_head(folder: Path, head: Head) -> None:
    """Write the head, cut to the real vocabulary, unchanged (weights in their type, scale and soft cap)."""
    tensors = {"weight": head.weight_VD.detach().cpu().contiguous()}
    if head.bias_V is not None:
        tensors["bias"] = head.bias_V.detach().cpu().contiguous()
    transformation = json.dumps({"scale": head.scale, "soft_cap": head.soft_cap})
    # One entry: safetensors writes several in an order that differs from process to process.
    metadata = {"head": f"{_sha256(tensors, transformation)} {transformation}"}
    write_durably(folder / HEAD, save(tensors, metadata=metadata))


def load_head(folder: Path) -> Head:
    """Load the head that `save_head` wrote. Raises UserError if it is missing or has changed."""
    path = folder / HEAD
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"{path}: missing: run `distill cache-teacher` again, it writes the head") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}): delete it and run `distill cache-teacher` again") from None
    digest, _, text = metadata.get("head", "").partition(" ")
    try:
        transformation = checks.parse_object(text.encode())
        is_whole = checks.wrong(transformation, _VALUES) is None and digest == _sha256(tensors, text)
    except (ValueError, RuntimeError):  # another's JSON or tensors
        is_whole = False
    if "weight" not in tensors or not is_whole:
        raise UserError(f"{path}: has changed: delete it and run `distill cache-teacher` again")
    return Head(tensors["weight"], tensors.get("bias"), **transformation)


def _sha256(tensors: dict[str, torch.Tensor], transformation: str) -> str:
    digest = hashlib.sha256(transformation.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
