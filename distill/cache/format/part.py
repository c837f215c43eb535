"""A part of a cache: the shards that one machine makes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from distill.cache.format import checks
from distill.cache.format.folder import PART
from distill.errors import UserError
from distill.system.files import read_bounded

_LIMIT = 2**10
"""Largest size of a part's file in bytes."""


@dataclass(frozen=True)
class Part:
    """Part `number` (from 1) of `count`."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Parse `3/8`. Raises UserError for anything else."""
        match = re.fullmatch(r"([1-9][0-9]{0,8})/([1-9][0-9]{0,8})", text)
        if not match or int(match[1]) > int(match[2]):
            raise UserError(f"cache.part: '{text}': give k/n with k from 1 to n, for example 3/8")
        return cls(int(match[1]), int(match[2]))

    def shards(self, total: int) -> range:
        """Return its shards among all: a contiguous range, as long as the others' to within one."""
        if self.count > total:
            raise UserError(
                f"cache.part: {self}: the cache has only {total} shards: give at most {total} parts, "
                "or make --cache.shard_samples smaller (everywhere)"
            )
        return range((self.number - 1) * total // self.count, self.number * total // self.count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def read_part(folder: Path) -> Part | None:
    """Return the part of a cache that a folder holds, None for all of it. Raises UserError if that is not readable."""
    path = folder / PART
    if not path.exists():
        return None
    try:
        return Part.parse(checks.parse_object(read_bounded(path, _LIMIT))["part"])
    except (ValueError, KeyError, TypeError, OSError, UserError):
        raise UserError(f"{path}: damaged: delete it and run `distill cache-teacher` with --cache.part again") from None
