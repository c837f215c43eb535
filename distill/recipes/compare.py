"""`distill compare`: several runs on one page."""

from __future__ import annotations

from pathlib import Path

from distill.errors import UserError
from distill.report.compare import MADE_BY, compare
from distill.system.files import write_durably
from distill.system.progress import say

_OURS = f'<meta name="generator" content="{MADE_BY} '.encode()
_BEGINNING = 4096
"""Bytes at the beginning of a page that name its generator."""


def main(runs: list[str], to: str) -> int:
    """Write the page of `runs` to the file `to`, which is new or such a page."""
    page = Path(to)
    _refuse_what_is_not_ours(page)
    content = compare([Path(run) for run in runs]).encode("utf-8", "replace")
    try:
        write_durably(page, content)
    except OSError as error:
        raise UserError(f"{to}: cannot be written ({error.strerror}): choose another place with --to") from None
    say(f"compare: {page}")
    return 0


def _refuse_what_is_not_ours(page: Path) -> None:
    if page.is_dir():
        raise UserError(f"{page}: is a folder: name a file, for example --to {page / 'compare.html'}")
    try:
        with open(page, "rb") as file:
            is_ours = _OURS in file.read(_BEGINNING)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{page}: cannot be read ({error.strerror}): choose another place with --to") from None
    if not is_ours:
        raise UserError(f"{page}: is there already and is no page of distill compare: choose another name with --to")
