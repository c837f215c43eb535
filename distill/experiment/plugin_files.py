"""Files with code of the user's own, as an experiment file names them: here, or else beside it. Nothing heavy."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distill.system.files import last_part, names_only

_KEYS = ("student.class_path", "teacher.class_path", "loss.divergence", "evaluate.metric", "corpus.reader")
"""Keys that may name a file's class or function."""


def with_files_beside(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return an experiment file's content in which plug-ins are named as they are found from the working folder.

    A name such as `mine.py:Student` that leads to no file from here, but to one from the file's `folder`, gets that
    file's path. All others stay as they are.
    """
    result = copy.deepcopy(dict(content))
    for holder, key in _places(result):
        holder[key] = _found(holder[key], folder)
    return result


def _places(content: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the places of plug-ins' names, each as the mapping or list that holds it and its key there."""
    for section, _, key in (name.partition(".") for name in _KEYS):
        if isinstance(content.get(section), dict):
            yield from _texts(content[section], [key])
    for section, key, inner in (("corpus", "sources", "reader"), ("train", "callbacks", "class_path")):
        values = content[section].get(key) if isinstance(content.get(section), dict) else None
        if isinstance(values, list):
            yield from _texts(values, range(len(values)))
            for each in values:
                if isinstance(each, dict):
                    yield from _texts(each, [inner])


def _texts(holder: Any, keys: Any) -> Iterator[tuple[Any, Any]]:
    values = dict(enumerate(holder)) if isinstance(holder, list) else holder
    return ((holder, key) for key in keys if isinstance(values.get(key), str))


def _found(name: str, folder: Path) -> str:
    file, _, attribute = name.rpartition(":")
    if not file.endswith(".py") or file.startswith("~") or Path(file).exists() or not (folder / file).is_file():
        return name
    return f"{folder / file}:{attribute}"


def without_place(value: Any) -> Any:
    """Return a setting as it is compared: of a file with code of the user's own, and of absolute paths, the last part.

    The same file has another path from another working folder. A hash of its content is compared beside it.
    """
    value = names_only(value)
    return last_part(value) if isinstance(value, str) and ".py:" in value else value
