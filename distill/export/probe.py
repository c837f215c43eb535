"""Fixed texts, our own logits on them, and the distance of another program's logits from ours.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.errors import UserError
from distill.models.language_model import hidden_states
from distill.plugins import load_language_model
from distill.system.files import read_bounded

TEXTS = (
    "The cat sat on the mat, and the rain fell on the roof all night. In the morning the streets were full of water, "
    "and nobody in the village could remember such a storm.",
    "def area(radius: float) -> float:\n    return 3.14159 * radius ** 2  # in square metres\n",
    "Élan vital, naïveté, 日本語, 😀: 1234567890 tokens, x² + y² = z².",
)
LONGEST = 64
"""Largest number of tokens of a text that are compared."""


@dataclass(frozen=True)
class Difference:
    """The distance of two programs' logits of the same tokens."""

    largest: float
    """Largest |ours − theirs|, in logits; NaN if either is not finite."""
    relative: float
    """Ratio ‖ours − theirs‖₂ / ‖ours‖₂ over everything."""
    positions: int


def encode(tokenizer: Any, limit: int = LONGEST) -> list[list[int]]:
    """Return the first `limit` token ids of each of `TEXTS`."""
    rows = [list(tokenizer(text).input_ids)[:limit] for text in TEXTS]
    return [row for row in rows if row]


@torch.no_grad()
def our_logits(model: Any, rows: Iterable[Sequence[int]]) -> list[Tensor]:
    """Return float32 logits `[N, V]` of `head(body(ids))` for each row of token ids.

    Raises UserError if the vocabulary of the tokenizer is larger than the model's.
    """
    vocabulary, found = model.head.weight_VD.shape[0], []
    for row in rows:
        if max(row) >= vocabulary:
            raise UserError(f"the tokenizer's token {max(row)} has no row in the model's head of {vocabulary:,} rows")
        ids_BL = torch.tensor([row])
        positions_BL = torch.arange(len(row))[None]
        found.append(model.head(hidden_states(model, ids_BL, positions_BL))[0].float())
    return found


def load_rounded(source: Path, dtype: torch.dtype, class_path: str | None = None) -> Any:
    """Load our model of `source` in float32, with its saved values rounded to `dtype`."""
    model = load_language_model(source, class_path=class_path)
    with torch.no_grad():
        for weight in model.state_dict().values():
            if weight.is_floating_point():
                weight.copy_(weight.to(dtype))
    return model


def longest_input(source: Path) -> int:
    """Return a number of tokens that the model of `source` surely takes: its configuration's, or its training's."""
    config = read_object(source / "config.json")
    trained = {} if config else read_object(source / "settings.json").get("cache", {})
    limits = (config.get("max_position_embeddings"), config.get("n_positions"), trained.get("sequence_length"))
    return min((limit for limit in limits if isinstance(limit, int)), default=LONGEST)


def compare(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Difference:
    """Return the difference of logits `[N, V]`, row by row. Raises UserError if their shapes differ."""
    largest, squares, norm = [], 0.0, 0.0
    for our_NV, their_NV in zip(ours, theirs, strict=True):
        if our_NV.shape != their_NV.shape:
            raise UserError(f"logits of shape {tuple(their_NV.shape)} instead of {tuple(our_NV.shape)}")
        error_NV = our_NV - their_NV.float()
        largest.append(error_NV.abs().max())
        squares += float(error_NV.double().square().sum())
        norm += float(our_NV.double().square().sum())
    positions = sum(len(our_NV) for our_NV in ours)
    return Difference(float(torch.stack(largest).max()), (squares / max(norm, 1e-300)) ** 0.5, positions)


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if there is no file."""
    return dict(json.loads(read_bounded(path))) if path.is_file() else {}
