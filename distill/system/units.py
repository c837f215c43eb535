"""Sizes and durations as people write them, parsed and printed: `20GB`, `12GiB`, `11h30m`; 269.1 MB, 2 h 05 min."""

from __future__ import annotations

import math
import re

from distill.errors import UserError

_BYTES = {"B": 1} | {
    f"{prefix}{ending}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for ending, base in (("B", 1000), ("IB", 1024))
}
_SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([kKmMgGtT]?[iI]?[bB])\s*")
_SECONDS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_DURATION = re.compile(r"(?:(\d{1,9})d)?(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?")


def parse_size(text: str, key: str) -> int:
    """Return the bytes of `20GB`, `500 MB` or `12GiB`. Raises UserError that names the `key` for anything else."""
    match = _SIZE.fullmatch(text)
    if not match or match[2].upper() not in _BYTES:
        raise UserError(f"{key}: '{text}' is not a size; for example: 20GB, 500MB, 12GiB")
    return int(float(match[1]) * _BYTES[match[2].upper()])


def parse_duration(text: str, key: str) -> float:
    """Return the seconds of `90s`, `45m`, `11h30m` or `2d`. Raises UserError that names the `key` for anything else."""
    found = _DURATION.fullmatch(text.strip())
    if not text.strip() or found is None:
        raise UserError(f"{key}: '{text}' is not a length of time; write it as 90s, 45m, 11h30m or 2d")
    return float(
        sum(int(number) * seconds for number, seconds in zip(found.groups(), _SECONDS.values(), strict=True) if number)
    )


def size(value: float) -> str:
    """Write bytes in decimal units: 269.1 MB."""
    for step, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= step:
            return f"{three_or_four_digits(value / step)} {unit}"
    return f"{three_or_four_digits(value)} bytes"


def duration(seconds: float) -> str:
    """Write a length of time: 8.1 s, 1 min 21 s, 2 h 05 min, 3 d 04 h."""
    if not math.isfinite(seconds) or seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    for big, small, names in ((86_400, 3_600, "d h"), (3_600, 60, "h min"), (60, 1, "min s")):
        if round(seconds / small) * small >= big:
            units, rest = divmod(round(seconds / small), big // small)
            first, second = names.split()
            return f"{units} {first} {rest:02d} {second}"
    raise AssertionError(seconds)


def three_or_four_digits(value: float) -> str:
    """Write three digits, four from 100 on, and a whole number as it is: 3.17, 44, 269.1, 1,234."""
    magnitude = abs(value)
    if not magnitude < 999.5 or value == int(value):  # not-a-number too
        return f"{value:,.0f}"
    return f"{value:.1f}" if magnitude >= 99.95 else f"{value:.3g}"
