"""The one exception that means: the user can mend this; the command line prints its message and exits with status 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave. The message says where, what, the nearest valid choice, and what to do."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'? (known: x, y)"` for a misspelt `word`, without the question when nothing is near."""
    choices = sorted(known)
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    question = f"; did you mean '{near[0]}'?" if near else ""
    return f"{question} (known: {', '.join(choices)})"
