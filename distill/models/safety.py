"""Checks of a model's folder, which may come from anyone, before a library opens it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from distill.errors import UserError
from distill.system.files import is_inside, open_regular, read_bounded

OPENED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "vocab.*")
"""Names of the files that a model or a tokenizer is read from."""
TEMPLATES = "additional_chat_templates"


def check_folder(folder: Path, name: str) -> None:
    """Raise UserError if opening the folder would read elsewhere, unpickle, or run code that a file in it names."""
    for path in _opened(folder):
        if not path.is_file():
            raise UserError(f"{name}: {path.name} is no plain file: remove it, or put the file itself there")
        if not is_inside(path, folder):
            raise UserError(f"{name}: {path.name} is a link out of this folder and is not followed: copy the file here")
    for index in folder.glob("*.safetensors.index.json"):
        _check_index(index, name)
    if (folder / "adapter_config.json").exists() and not (folder / "adapter_model.safetensors").exists():
        raise UserError(f"{name}: its adapter has no adapter_model.safetensors, and pickled weights are refused")
    _check_config(_object(folder / "config.json", name), name)


def check_weights(path: Path, name: str) -> None:
    """Raise UserError for a safetensors or GGUF file that is empty, cut off or something else altogether."""
    start = b""
    try:
        with open(open_regular(path), "rb") as file:
            start = file.read(512)
        if path.suffix == ".gguf":
            if start.startswith(b"GGUF"):
                return
            problem = "no GGUF file"
        else:
            with safe_open(path, framework="numpy"):  # which compares the header with the file's size
                return
    except OSError as error:
        problem = f"unreadable ({error.strerror or error})"
    except SafetensorError as error:
        problem = f"cut off or damaged ({error})"
    if path.exists() and path.stat().st_size == 0:
        problem = "empty"
    elif start.startswith(b"version https://git-lfs"):
        raise UserError(f"{name}: {path.name} is a git-lfs pointer, not the weights: run `git lfs pull` there")
    elif start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        problem = "an HTML page, not the weights"
    raise UserError(f"{name}: {path.name} is {problem}: fetch it anew")


def _opened(folder: Path) -> Iterator[Path]:
    for path in sorted([*folder.glob("*"), *folder.glob(f"{TEMPLATES}/*")]):
        is_read = any(path.match(pattern) for pattern in OPENED)
        if is_read or (path.name == TEMPLATES and not (path.is_dir() and is_inside(path, folder))):
            yield path


def _check_index(path: Path, name: str) -> None:
    files = _object(path, name).get("weight_map")
    if not isinstance(files, dict):
        raise UserError(f"{name}: {path.name} has no weight_map: fetch the folder anew")
    for file in files.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{name}: {path.name} names {str(file)[:80]!r}, no safetensors file of this folder")


def _check_config(config: dict[str, Any], name: str) -> None:
    """Raise UserError for weights under another name, and for kernels of the hub, which are compiled code."""
    for key, value in _texts(config):
        if key == "transformers_weights":
            raise UserError(f"{name}: config.json names other weights, {value[:80]!r}: only model.safetensors is read")
        if key.endswith("_implementation") and "/" in value:
            raise UserError(f"{name}: config.json asks for code of the hub ({key}: {value[:80]!r}), which is not run")


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for inner, each in value.items():
            yield from _texts(each, inner)
    elif isinstance(value, str):
        yield key, value


def _object(path: Path, name: str) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if there is no file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(read_bounded(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: {path.name} cannot be read ({str(error)[:80]}): fetch the folder anew") from None
    if not isinstance(content, dict):
        raise UserError(f"{name}: {path.name} holds no object: fetch the folder anew")
    return content
