"""A language model's folder, written complete or not at all, and read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distill.errors import UserError, first_line
from distill.models.chat_templates import save_untagged
from distill.models.checkpoints import Checkpoint
from distill.models.generation import end_as
from distill.models.huggingface import HuggingFaceLanguageModel, load_pretrained
from distill.models.safety import check_weights
from distill.system.files import names_only, read_bounded
from distill.system.staging import replaced_folder

DESCRIPTION = "student.json"  # marks a model that a plug-in builds: {class_path, options, source}
WEIGHTS = "model.safetensors"
TRUST = "trust_remote_code"
NOT_KEPT = (
    "first_samples",
    "device",
    "measured",
    TRUST,
)  # arguments from the pipeline that are needed the first time only
_MOST_BYTES = 2**20


def save_language_model(
    model: torch.nn.Module,
    folder: str | Path,
    class_path: str,
    options: dict[str, Any],
    tokenizer: Any,
    write_more: Callable[[Path], None] | None = None,
    source: str | None = None,
) -> Path:
    """Write `model` and `tokenizer` to `folder`, replacing its content only when the new folder is complete.

    A Hugging Face model becomes an ordinary Hugging Face folder, whose texts end with the tokenizer's end token. Any
    other becomes weights and `student.json`, from which `class_path` is called again with `options`: give the complete
    ones, as `plugins.arguments` returns them, and as `source` the hash of the class's code (`plugins.source_of`). Of
    absolute paths it has the last part only. If a model has a method `merged`, its result is written instead.
    `write_more` writes further files into the new folder before that is renamed.
    """
    folder = Path(folder)
    merged: Any = getattr(model, "merged", None)
    model = model if merged is None else merged()
    with replaced_folder(folder) as new:
        if isinstance(model, HuggingFaceLanguageModel):
            end_as(model.model, tokenizer)
            model.save_pretrained(new)
        else:
            _save_custom(model, new, {"class_path": class_path, "options": options, "source": source})
        save_untagged(tokenizer, new)
        if write_more is not None:
            write_more(new)
    return folder


def _save_custom(model: torch.nn.Module, folder: Path, description: dict[str, Any]) -> None:
    from safetensors.torch import _remove_duplicate_names, save_file

    kept = {name: value for name, value in description["options"].items() if name not in NOT_KEPT}
    try:
        text = json.dumps(names_only({**description, "options": kept}), indent=2)
    except TypeError as error:
        raise UserError(f"student.options of {description['class_path']} cannot be written as JSON: {error}") from error
    # A tensor that several names share (a tied head) is written once, as `save_model` would; but that notes the other
    # names in an order that no two runs share, so that equal weights would have other bytes.
    tensors = model.state_dict()
    for others in _remove_duplicate_names(tensors).values():
        for name in others:
            del tensors[name]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(folder / WEIGHTS))
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def load_hugging_face(folder: Path, dtype: torch.dtype) -> HuggingFaceLanguageModel:
    """Return the model of a Hugging Face folder. Raises UserError for a folder without one."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds no language model (neither config.json nor {DESCRIPTION})")
    return HuggingFaceLanguageModel(load_pretrained(Checkpoint(folder, None, str(folder)), dtype))


def read_description(folder: Path) -> dict[str, Any] | None:
    """Return the `class_path` and `options` that build the folder's model again; None for a Hugging Face folder.

    The folder may come from anyone. Raises UserError for a damaged file, and for options that ask for trust.
    """
    path = folder / DESCRIPTION
    if not path.exists():
        return None
    try:
        description = json.loads(read_bounded(path, _MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}): export or train the student again") from None
    kinds = {"class_path": str, "options": dict}
    if not isinstance(description, dict) or any(type(description.get(key)) is not kind for key, kind in kinds.items()):
        raise UserError(f"{path}: needs a class_path and options: export or train the student again")
    if TRUST in description["options"]:
        raise UserError(f"{path}: sets {TRUST}, and a model's folder cannot ask for trust: remove the line")
    return description


def load_weights(model: Any, folder: Path, description: dict[str, Any]) -> None:
    """Give a model that was built from its `description` the weights in its folder."""
    from safetensors.torch import load_model

    check_weights(folder / WEIGHTS, str(folder))
    try:
        load_model(model, str(folder / WEIGHTS), strict=True)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{folder}: the weights do not fit {description['class_path']}: {first_line(error)}") from error
    if getattr(model, "max_position_embeddings", None) is None and "sequence_length" in description["options"]:
        model.max_position_embeddings = description["options"]["sequence_length"]  # the length that it was made for
