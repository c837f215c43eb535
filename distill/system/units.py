"""Lengths of time as people write them: `90s`, `45m`, `11h30m`, `2d`."""

from __future__ import annotations

import re

from distill.errors import UserError

_SECONDS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_FORM = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def parse_duration(text: str, key: str) -> float:
    """Seconds of a length of time. Raises UserError that names the `key` it was given for."""
    found = _FORM.fullmatch(text.strip())
    if not text.strip() or found is None:
        raise UserError(f"{key}: '{text}' is not a length of time; write it as 90s, 45m, 11h30m or 2d")
    return float(
        sum(int(number) * seconds for number, seconds in zip(found.groups(), _SECONDS.values(), strict=True) if number)
    )
