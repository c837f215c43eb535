"""Values that a stranger wrote, checked before anything relies on them: JSON types, ranges, sizes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

MOST_SAMPLES = 2**40
MOST_SHARDS = 2**20
MOST_SHARD_SAMPLES = 2**20
MOST_TOKENS = 2**24
"""Largest number of tokens in a sample."""
MOST_VOCABULARY = 2**24
MOST_PLACES = 2**26
"""Largest size of the padded targets of one sample (positions × entries): reading one takes some of 8 bytes a place."""

Check = Callable[[Any], bool]


def parse_object(text: bytes) -> dict[str, Any]:
    """Return a JSON object. Raises ValueError for anything else, however odd."""
    try:
        content = json.loads(text.decode("utf-8"), parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number")


def printable(value: Any) -> str:
    """Return a stranger's value for a message: short, and without characters that move a terminal's cursor."""
    text = str(value)[:80]
    return text if text.isprintable() else ascii(text)


def whole(low: int, high: int) -> Check:
    """Return a check for a whole number from `low` to `high`."""
    return lambda value: type(value) is int and low <= value <= high


def positive(value: Any) -> bool:
    """Tell whether this is a number above 0 that a float can hold."""
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def is_bool(value: Any) -> bool:
    return type(value) is bool


def is_text(value: Any) -> bool:
    """Tell whether this is a text that can be shown: nothing in it moves a terminal's cursor."""
    return type(value) is str and value.isprintable()


def hexadecimal(digits: int) -> Check:
    """Return a check for a text of so many hexadecimal digits."""
    return lambda value: is_text(value) and re.fullmatch(rf"[0-9a-f]{{{digits}}}", value) is not None


def list_of_texts(most: int) -> Check:
    """Return a check for a list of at most so many texts."""
    return lambda value: type(value) is list and len(value) <= most and all(map(is_text, value))


def texts(value: Any) -> bool:
    """Tell whether these are names with texts."""
    return type(value) is dict and all(is_text(text) for pair in value.items() for text in pair)


_PARAMETERS: dict[str, Check] = {
    "threshold": lambda value: positive(value) and 1e-6 <= value <= 1,
    "entries": whole(1, 2**16),
    "size": whole(1, 2**20),
}


def parameters(value: Any) -> bool:
    """Tell whether these are parameters that a scheme can have."""
    return type(value) is dict and all(name in _PARAMETERS and _PARAMETERS[name](value[name]) for name in value)


def parameters_of_version_1(value: Any) -> bool:
    """Tell whether these are parameters that a scheme of format version 1 could have."""
    more = {"draws": whole(1, 2**10), "exponent": lambda value: positive(value) and value <= 100}
    return type(value) is dict and all(
        more[name](value[name]) if name in more else parameters({name: value[name]}) for name in value
    )


def sample_counts(value: Any) -> bool:
    """Tell whether these are names with numbers of samples."""
    return type(value) is dict and all(is_text(name) and whole(0, MOST_SAMPLES)(value[name]) for name in value)


def sample_ranges(value: Any) -> bool:
    """Tell whether these are names with `[first sample, the one after the last]`."""
    is_sample = whole(0, MOST_SAMPLES)
    return (
        type(value) is dict
        and len(value) > 0
        and all(map(is_text, value))
        and all(
            type(pair) is list and len(pair) == 2 and all(map(is_sample, pair)) and pair[0] <= pair[1]
            for pair in value.values()
        )
    )


def wrong(content: dict[str, Any], expected: dict[str, Check]) -> str | None:
    """Return the fault in the keys and values of an object, in a few words, or None."""
    if content.keys() != expected.keys():
        return f"unexpected or missing keys: {printable(', '.join(sorted(content.keys() ^ expected.keys())))}"
    for key, is_good in expected.items():
        if not is_good(content[key]):
            return f"{key}: {printable(content[key])} is not possible"
    return None
