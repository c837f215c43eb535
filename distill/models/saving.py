"""Write a language model to a folder that is complete or absent, and build it again from there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distill.errors import UserError
from distill.models.checkpoints import Checkpoint
from distill.models.huggingface import HuggingFaceLanguageModel, load_pretrained
from distill.models.tokenizers import load_tokenizer, vocab_size
from distill.system.files import sole_writer, sync_folder

DESCRIPTION = "student.json"  # marks a model that a plug-in builds: {class_path, options}
WEIGHTS = "model.safetensors"
NOT_KEPT = ("calibration", "device")  # what the pipeline supplies to make a student, and not to make it again


def save_language_model(
    model: torch.nn.Module,
    folder: str | Path,
    class_path: str,
    options: dict[str, Any],
    tokenizer: Any,
    write_more: Callable[[Path], None] | None = None,
) -> Path:
    """Write `model` and `tokenizer` to `folder`, replacing what is there only when the new folder is complete.

    A Hugging Face model becomes an ordinary Hugging Face folder. Any other becomes weights and `student.json`, from
    which `class_path` is called again with `options`: give the complete ones, as `plugins.arguments` returns them.
    A model with a method `merged` is written as what that returns. `write_more` writes further files into the folder
    it is given, which are part of what is complete or absent.
    """
    folder = Path(folder)
    recover(folder)
    merged: Any = getattr(model, "merged", None)
    model = model if merged is None else merged()
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = _new(folder), _old(folder)
    with sole_writer(new):
        try:
            _remove_content(new)  # of a process that died
            shutil.rmtree(old, ignore_errors=True)
            if isinstance(model, HuggingFaceLanguageModel):
                model.save_pretrained(new)
            else:
                _save_custom(model, new, class_path, options)
            tokenizer.save_pretrained(new)
            if write_more is not None:
                write_more(new)
            _sync(new)
            _replace(folder, new, old)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def recover(folder: str | Path) -> None:
    """Bring back the model that a process was about to replace when it died, between one name and the other."""
    folder = Path(folder)
    if folder.exists() or not _old(folder).exists():
        return
    with sole_writer(_new(folder)):  # not while it is being replaced
        if not folder.exists():
            _old(folder).rename(folder)
            sync_folder(folder.parent)
        shutil.rmtree(_new(folder), ignore_errors=True)


def _new(folder: Path) -> Path:
    """Where the next content of `folder` grows."""
    return folder.with_name(f".{folder.name}.new")


def _old(folder: Path) -> Path:
    """Where the present content of `folder` goes for the moment in which it is replaced."""
    return folder.with_name(f".{folder.name}.old")


def _replace(folder: Path, new: Path, old: Path) -> None:
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    sync_folder(folder.parent)


def _remove_content(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(folder: Path) -> None:
    """Reach the disk before the name does: a power cut must not leave a good name over empty files."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync_folder(path)


def _save_custom(model: torch.nn.Module, folder: Path, class_path: str, options: dict[str, Any]) -> None:
    from safetensors.torch import save_model

    kept = {name: value for name, value in options.items() if name not in NOT_KEPT}
    try:
        text = json.dumps({"class_path": class_path, "options": kept}, indent=2)
    except TypeError as error:
        raise UserError(f"student.options of {class_path} cannot be written as JSON: {error}") from error
    save_model(model, str(folder / WEIGHTS))  # writes a tensor that several names share (a tied head) once
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def load_language_model(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """The language model that `save_language_model` wrote, or of any Hugging Face folder, in evaluation mode."""
    folder = Path(folder)
    recover(folder)
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
    _refuse_code_inside(description["class_path"].rpartition(":")[0], folder)
    tokenizer = load_tokenizer(Checkpoint(folder, None, str(folder)))
    offered = {"vocab_size": vocab_size(tokenizer)}
    model: Any = plugins.build(description["class_path"], "student", description["options"], offered)
    try:
        load_model(model, str(folder / WEIGHTS), strict=True)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{folder}: the weights do not fit {description['class_path']}: {error}") from error
    if getattr(model, "max_position_embeddings", None) is None and "sequence_length" in description["options"]:
        model.max_position_embeddings = description["options"]["sequence_length"]  # what it was made to read
    return model


def _refuse_code_inside(module: str, folder: Path) -> None:
    """Raises UserError when a file or a module that is found from here lies in the model's own folder."""
    path = Path(module).expanduser() if module.endswith(".py") else Path(*module.split("."))
    if path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder}: code that comes inside a model's folder is not run; move {path.name} out of it")
