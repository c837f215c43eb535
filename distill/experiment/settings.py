"""Settings that a model was made with: written beside it, and compared before it counts as done or is resumed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.experiment.folders import write_json
from distill.experiment.plugin_files import without_place
from distill.system.files import names_only, read_bounded

FILE = "settings.json"
NOT_COMPARED = "may_change"
"""Section of settings that are noted, and may be others when a training is resumed."""
SOURCE, DEFAULTS = "student.source", "student.defaults."
"""Beginnings of the keys of a student's code, and of its options that the experiment does not give."""
_MOST_BYTES = 2**24


def read(folder: Path) -> dict[str, Any]:
    """Return the settings in a folder. Raises UserError if they are missing or damaged."""
    try:
        found = json.loads(read_bounded(folder / FILE, _MOST_BYTES))
        if isinstance(found, dict):
            return found
    except (OSError, ValueError):
        pass
    raise UserError(f"{folder}: its {FILE} is missing or damaged: remove the folder and train again")


def digest(folder: Path) -> str:
    """Return the sha256 (hex) of the settings that the model in a folder depends on. Raises UserError without any."""
    found = {key: value for key, value in read(folder).items() if key != NOT_COMPARED}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def write(folder: Path, content: dict[str, Any]) -> None:
    """Write a folder's settings. Paths are cut to the names at their ends, because a model is handed on."""
    write_json(folder / FILE, names_only(content))


def differences(folder: Path, settings: dict[str, Any]) -> list[str]:
    """Return the differences of a folder's settings from ours, as `train.learning_rate: 0.1 there, 0.2 here`.

    Raises UserError if the folder's are missing or damaged.
    """
    found = read(folder)
    there = _flat(names_only(found))
    here = _flat(json.loads(json.dumps(settings)))
    student = found.get("student")
    if not isinstance(student, dict) or "source" not in student:  # of a version that did not describe it in full
        here = {key: value for key, value in here.items() if not key.startswith((SOURCE, DEFAULTS))}
    return [
        f"{key}: {there.get(key)} there, {here.get(key)} here"
        for key in sorted(there.keys() | here.keys())
        if without_place(there.get(key)) != without_place(here.get(key)) and not key.startswith(f"{NOT_COMPARED}.")
    ]


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
