"""Dimensions of published models, which ship with the package, so that a plan needs neither network nor checkpoint."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "architectures"


@dataclass(frozen=True)
class Published:
    """Facts about a model on the hub."""

    names: tuple[str, ...]
    """Hub names that share the architecture."""
    tokens: int
    """Tokens of its tokenizer: the highest id plus one."""
    parameters: int
    config: dict[str, Any]
    """Entries of its `config.json` that determine shapes."""
    sentencepiece_tokens: int | None = None
    """Tokens of its SentencePiece `tokenizer.model` alone, if they are fewer."""

    def write_config(self, folder: Path) -> Path:
        """Make `folder` a checkpoint without weights."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config), encoding="utf-8")
        return folder


@functools.cache
def published_models() -> dict[str, Published]:
    """Return all published models, by each of their hub names."""
    found = {}
    for file in sorted(FOLDER.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        model = Published(**{**content, "names": tuple(content["names"])})
        found.update(dict.fromkeys(model.names, model))
    return found
