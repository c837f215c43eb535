"""The exception for mistakes that a user can mend, printed before an exit with status 2, with the nearest names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path


class UserError(Exception):
    """A mistake in the user's input. The message says where, what, the nearest valid choice, and what to do."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'? (known: x, y)"` for a misspelt `word`, without the question when nothing is near."""
    choices = sorted(known)
    return f"{nearest(word, choices)} (known: {', '.join(choices)})"


def nearest(word: str, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> str:
    """Return `"; did you mean 'x'?"` with up to `most` of the known names, or nothing when none is near."""
    near = difflib.get_close_matches(str(word), sorted(known), n=most, cutoff=cutoff)  # a YAML key may be a number
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def nearest_path(missing: Path, cutoff: float, suits: Callable[[Path], bool] = lambda path: True) -> str:
    """Return such a question with the path that resembles the first part of `missing` that does not exist."""
    while not missing.parent.exists():
        missing = missing.parent
    names = [entry.name for entry in missing.parent.iterdir() if suits(entry)] if missing.parent.is_dir() else []
    near = difflib.get_close_matches(missing.name, sorted(names), n=1, cutoff=cutoff)
    return f"; did you mean '{missing.parent / near[0]}'?" if near else ""


def first_line(error: BaseException) -> str:
    """Return a library's error message, cut to the length of our own messages."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
