"""YAML read with care: keys that stand twice and references without end are refused, as are octal numbers."""

from __future__ import annotations

import re
from typing import Any

MOST_VALUES = 100_000
"""Largest number of values in a file, each reference counted as all that it stands for."""

_OTHER_BASE = r":|^[-+]?0[0-9_]+$"
"""Numbers that YAML 1.1 takes for octal (010 is 8) or sexagesimal ones (1:30 is 90)."""


def load_yaml(text: str) -> Any:
    """Return the content of a YAML document as plain values.

    Raises yaml.YAMLError for a text that is not YAML, RecursionError for one that is nested too deeply, and ValueError
    for a key that stands twice in one mapping, a number of another base than 10 or 16, a reference to itself, or
    references that stand for too many values.
    """
    import yaml

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None and _values(root, {}) > MOST_VALUES:
        raise ValueError(f"its references stand for more than {MOST_VALUES:,} values")
    return yaml.safe_load(text)


def _values(node: Any, known: dict[int, int | None]) -> int:
    """Return the number of values below a node. `known`: those of the nodes seen, None for one that is not done."""
    if id(node) in known:
        if (number := known[id(node)]) is None:
            raise ValueError(f"line {node.start_mark.line + 1}: refers to itself")
        return number
    known[id(node)] = None
    children: list[Any] = []
    if node.tag.endswith((":int", ":float")) and re.search(_OTHER_BASE, node.value):
        raise ValueError(
            f"line {node.start_mark.line + 1}: YAML reads {node.value} in base 8 or 60: write it in base 10"
        )
    if node.id == "sequence":
        children = node.value
    elif node.id == "mapping":
        _check_keys(node)
        children = [value for _, value in node.value]
    known[id(node)] = number = 1 + sum(_values(child, known) for child in children)
    return number


def _check_keys(mapping: Any) -> None:
    first: dict[tuple[str, str], int] = {}
    for key, _ in mapping.value:
        if key.id == "scalar":
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in first:
                raise ValueError(
                    f"line {line}: {key.value} stands there twice, first in line {first[name]}: remove one"
                )
            first[name] = line
