"""Checks of a model's folder, which may come from anyone, before a library opens it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from distill.errors import UserError, first_line
from distill.models.gguf_header import plain_reader
from distill.system.files import is_inside, open_regular, read_bounded

OPENED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "vocab.*")
"""Names of the files that a model or a tokenizer is read from."""
OBJECTS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
"""JSON files of which transformers leaves a damaged one out, at times without a word."""
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_experts", "num_local_experts")
SECTIONS = ("quantization_config", "compression_config", "text_config")
"""Keys of a configuration whose values are objects."""
MOST_LAYERS = 10_000
"""Layers beyond which a model would be built without end."""
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
    for file in OBJECTS:
        _check_config(_object(folder / file, name), file, name)


def check_weights(path: Path, name: str) -> None:
    """Raise UserError for a safetensors or GGUF file that is empty, cut off or something else altogether.

    Of a GGUF file only the beginning is looked at; `check_gguf` reads its table of tensors.
    """
    problem = spoilt(path)
    if problem is None and path.suffix == ".gguf":
        with open(path, "rb") as file:
            problem = None if file.read(4) == b"GGUF" else "is no GGUF file: fetch it anew"
    elif problem is None:
        try:
            with safe_open(path, framework="numpy"):  # which compares the header with the file's size
                return
        except SafetensorError as error:
            problem = f"is cut off or damaged ({error}): fetch it anew"
    if problem is not None:
        raise UserError(f"{name}: {path.name} {problem}")


def check_gguf(path: Path, name: str) -> None:
    """Raise UserError for a GGUF file that is cut off or damaged. This reads its vocabulary, which may take seconds."""
    check_weights(path, name)
    try:
        plain_reader()(path)
    except Exception as error:  # it relies on what the file says
        raise UserError(f"{name}: {path.name} is cut off or damaged ({first_line(error)}): fetch it anew") from None


def spoilt(path: Path) -> str | None:
    """Return what became of a file that is no file of a model: empty, a git-lfs pointer, an HTML page; else None."""
    try:
        with open(open_regular(path), "rb") as file:
            start = file.read(512)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    if not start:
        return "is empty: fetch it anew"
    if start.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself: run `git lfs pull` there"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is an HTML page, not the file itself: fetch it anew"
    return None


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


def _check_config(config: dict[str, Any], file: str, name: str) -> None:
    """Raise UserError for weights under another name, and for kernels of the hub, which are compiled code."""
    for key in SECTIONS:
        if not isinstance(config.get(key), dict | None):
            raise UserError(
                f"{name}: {file} says {key} {str(config[key])[:40]!r}: an object with settings is wanted: fetch the "
                "folder anew, or take that line out if the weights are plain"
            )
    for key, value in config.items():
        if key in LAYERS and isinstance(value, int | float) and not 0 <= value <= MOST_LAYERS:
            raise UserError(
                f"{name}: {file} says {key} {str(value)[:20]}: not between 0 and {MOST_LAYERS:,}: fetch the folder anew"
            )
    for key, value in _texts(config):
        if key == "transformers_weights":
            raise UserError(f"{name}: {file} names other weights, {value[:80]!r}: only model.safetensors is read")
        if key.endswith("_implementation") and "/" in value:
            raise UserError(f"{name}: {file} asks for code of the hub ({key}: {value[:80]!r}), which is not run")


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
        list(_texts(content))  # as deep as it is nested
    except (OSError, ValueError, RecursionError) as error:
        if (problem := spoilt(path)) is not None:
            raise UserError(f"{name}: {path.name} {problem}") from None
        raise UserError(f"{name}: {path.name} cannot be read ({str(error)[:80]}): fetch the folder anew") from None
    if not isinstance(content, dict):
        raise UserError(f"{name}: {path.name} holds no object: fetch the folder anew")
    return content
