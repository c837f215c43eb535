"""A trimmed vocabulary: the teacher's tokens that a student keeps, and the map from the teacher's ids to its own.

Shapes: V the teacher's vocabulary, D hidden size.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from distill.errors import UserError
from distill.models.language_model import Head

FILE = "vocabulary.safetensors"
"""Name of the file in a student's folder."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The teacher's tokens that stay. A token's place among them is the student's id."""

    kept_ids: Tensor
    """The teacher's ids, int64, rising."""
    full_size: int
    """Tokens of the teacher's vocabulary."""

    def __post_init__(self) -> None:
        assert _is_sound(self.kept_ids, self.full_size), "kept ids rise, and lie in the vocabulary"

    def __len__(self) -> int:
        return len(self.kept_ids)

    @cached_property
    def to_student(self) -> Tensor:
        """The student's id of each of the teacher's tokens `[V]`; -1 means that it has none."""
        to_student_V = torch.full((self.full_size,), -1, dtype=torch.int64)
        to_student_V[self.kept_ids] = torch.arange(len(self.kept_ids))
        return to_student_V

    def mapped(self, ids: Tensor) -> Tensor:
        """Return the teacher's ids as the student's, in any shape; -1 where a token was dropped."""
        return self.to_student.to(ids.device)[ids]

    def covers(self, ids: Tensor) -> bool:
        """Tell whether all of these tokens were kept."""
        return bool((self.mapped(ids) >= 0).all())

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of its content."""
        return hashlib.sha256(f"{self.full_size} ".encode() + self.kept_ids.numpy().tobytes()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write `vocabulary.safetensors`."""
        content = save({"kept_ids": self.kept_ids.contiguous()}, metadata={"full_size": str(self.full_size)})
        (Path(folder) / FILE).write_bytes(content)

    @classmethod
    def load(cls, folder: str | Path) -> Vocabulary:
        """Load the vocabulary that `save` wrote. Raises UserError if it is missing or damaged."""
        path = Path(folder) / FILE
        try:
            with safe_open(path, framework="pt") as file:
                kept_ids, full_size = file.get_tensor("kept_ids"), int((file.metadata() or {})["full_size"])
        except FileNotFoundError:
            raise UserError(f"{path}: missing: it says which tokens this student has; train again") from None
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise UserError(f"{path}: damaged ({error}): train again") from None
        if not _is_sound(kept_ids, full_size):
            raise UserError(f"{path}: damaged (its ids do not rise, or lie beyond {full_size:,}): train again")
        return cls(kept_ids, full_size)


def _is_sound(kept_ids: Tensor, full_size: int) -> bool:
    if kept_ids.dtype != torch.int64 or kept_ids.ndim != 1 or not len(kept_ids):
        return False
    rises = bool((kept_ids[1:] > kept_ids[:-1]).all())
    return rises and int(kept_ids[0]) >= 0 and int(kept_ids[-1]) < full_size


def trim_head(head: Head, vocabulary: Vocabulary) -> Head:
    """Return the teacher's head over the kept tokens. Its softmax is the teacher's distribution conditioned on these.

    Raises ValueError if the head has fewer rows than the vocabulary.
    """
    head = head.with_rows(vocabulary.full_size)
    kept_ids = vocabulary.kept_ids.to(head.weight_VD.device)
    bias = None if head.bias_V is None else head.bias_V[kept_ids]
    return replace(head, weight_VD=head.weight_VD[kept_ids], bias_V=bias)
