"""The list of what was pushed: names and sha256 in coreutils' form, which `sha256sum -c` reads too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from distill.cache.format.folder import SUMS
from distill.errors import UserError

BEGUN = "SHA256SUMS.begun"
"""The list's name while the files are on their way. `SUMS` itself is written last: with it, all files are there."""
MOST_BYTES = 2**28
"""Largest size of a list, of some two million files."""

_LINE = re.compile(r"([0-9a-f]{64})  ([^\x00-\x1f\x7f\\]+)")


def encode(sums: Mapping[str, str]) -> bytes:
    """Return the list of files by name, each with its sha256 (hex)."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()


def decode(content: bytes, where: str) -> dict[str, str]:
    """Return the sha256 of each file in a list. Raises UserError for a list that `encode` did not write.

    No name leads out of the folder.
    """
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        lines = [""]
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None or not _is_inner(match[2]) or match[2] in found:
            raise UserError(f"{where}: {SUMS}, line {number}: is none of a list that `distill push` writes")
        found[match[2]] = match[1]
    if not found:
        raise UserError(f"{where}: {SUMS} is empty")
    return found


def _is_inner(name: str) -> bool:
    parts = name.split("/")
    return not PurePosixPath(name).is_absolute() and not any(part in ("", ".", "..") for part in parts)
