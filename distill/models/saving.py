"""Write a language model to a folder that is complete or absent, and build it again from there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from distill.errors import UserError
from distill.models.checkpoints import Checkpoint
from distill.models.huggingface import HuggingFaceLanguageModel, load_pretrained
from distill.models.tokenizers import load_tokenizer, vocab_size

DESCRIPTION = "student.json"  # marks a model that a plug-in builds: {class_path, options}
WEIGHTS = "model.safetensors"


def save_language_model(
    model: torch.nn.Module, folder: str | Path, class_path: str, options: dict[str, Any], tokenizer: Any
) -> Path:
    """Write `model` and `tokenizer` to `folder`, replacing what is there only when the new folder is complete.

    A Hugging Face model becomes an ordinary Hugging Face folder. Any other becomes weights and `student.json`, from
    which `class_path` is called again with `options`: give the complete ones, as `plugins.arguments` returns them.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.parent / f".{folder.name}.new-{os.getpid()}"
    old = folder.parent / f".{folder.name}.old-{os.getpid()}"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        if isinstance(model, HuggingFaceLanguageModel):
            model.save_pretrained(new)
        else:
            _save_custom(model, new, class_path, options)
        tokenizer.save_pretrained(new)
        _sync(new)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def _sync(folder: Path) -> None:
    """Reach the disk before the name does: a power cut must not leave a good name over empty files."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def _save_custom(model: torch.nn.Module, folder: Path, class_path: str, options: dict[str, Any]) -> None:
    from safetensors.torch import save_model

    try:
        text = json.dumps({"class_path": class_path, "options": options}, indent=2)
    except TypeError as error:
        raise UserError(f"student.options of {class_path} cannot be written as JSON: {error}") from error
    save_model(model, str(folder / WEIGHTS))  # writes a tensor that several names share (a tied head) once
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def load_language_model(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """The language model that `save_language_model` wrote, or of any Hugging Face folder, in evaluation mode."""
    folder = Path(folder)
    if (folder / DESCRIPTION).is_file():
        model = _load_custom(folder)
    elif (folder / "config.json").is_file():
        model = HuggingFaceLanguageModel(load_pretrained(Checkpoint(folder, None, str(folder)), dtype))
    else:
        raise UserError(f"{folder}: holds no language model (neither config.json nor {DESCRIPTION})")
    return model.to(device=device, dtype=dtype).eval()


def _load_custom(folder: Path) -> Any:
    from safetensors.torch import load_model

    from distill import plugins

    description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    source = Path(description["class_path"].rpartition(":")[0]).expanduser().resolve()
    if source.suffix == ".py" and source.is_relative_to(folder.resolve()):
        raise UserError(f"{folder}: code that comes inside a model's folder is not run; move {source.name} out of it")
    tokenizer = load_tokenizer(Checkpoint(folder, None, str(folder)))
    offered = {"vocab_size": vocab_size(tokenizer)}
    model: Any = plugins.build(description["class_path"], "student", description["options"], offered)
    try:
        load_model(model, str(folder / WEIGHTS), strict=True)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{folder}: the weights do not fit {description['class_path']}: {error}") from error
    return model
