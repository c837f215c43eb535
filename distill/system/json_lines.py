"""Files of one JSON object a line that only grow. An incomplete line does not count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill.system.files import append_durably, make_folder, read_bounded


def append(path: Path, entry: dict[str, Any]) -> None:
    """Add a line. Several processes can write at once, and each line stays whole."""
    make_folder(path.parent)
    append_durably(path, json.dumps(entry).encode() + b"\n")


def read(path: Path, limit: int) -> list[dict[str, Any]]:
    """Return all lines, oldest first, or none if there is no file. Unfinished lines of killed processes are skipped.

    Raises OSError if the file cannot be read, or is longer than `limit` bytes.
    """
    try:
        lines = read_bounded(path, limit).split(b"\n")
    except FileNotFoundError:
        return []
    return [entry for line in lines if isinstance(entry := _parsed(line), dict)]


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
