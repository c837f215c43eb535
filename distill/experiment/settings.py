"""What a model was made with: written beside it, and compared before it is taken for done or gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill.errors import UserError

FILE = "settings.json"


def read(folder: Path) -> dict[str, Any]:
    """The settings in a folder. Raises UserError when they are missing or damaged."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    except (OSError, ValueError):
        pass
    raise UserError(f"{folder}: its {FILE} is missing or damaged: remove the folder and train again")


def differences(folder: Path, settings: dict[str, Any]) -> list[str]:
    """What differs between the settings in a folder and ours, as `train.learning_rate: 0.1 there, 0.2 here`.

    Raises UserError when the folder's are missing or damaged.
    """
    there = _flat(read(folder))
    here = _flat(json.loads(json.dumps(settings)))
    return [
        f"{key}: {there.get(key)} there, {here.get(key)} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
