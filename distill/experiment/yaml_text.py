"""YAML read with care: plain values as they are written; keys that stand twice and octal numbers are refused."""

from __future__ import annotations

import re
from typing import Any

MOST_VALUES = 100_000
"""Largest number of values in a file, each reference counted as all that it stands for."""

_TAG = "tag:yaml.org,2002:"
_PLAIN = {f"{_TAG}{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
_OTHER_BASE = r":|^[-+]?0[0-9_]+$"
"""Numbers that YAML 1.1 takes for octal (010 is 8) or sexagesimal ones (1:30 is 90)."""


def load_yaml(text: str) -> Any:
    """Return the content of a YAML document as plain values. A date is text, as it is written.

    Raises yaml.YAMLError for a text that is not YAML, RecursionError for one that is nested too deeply, and ValueError
    for a key that stands twice in one mapping, a number of another base than 10 or 16, a reference to itself, values
    that are not plain (sets, binary data), half a character, or more than MOST_VALUES values.
    """
    import yaml

    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        if _values(root, {}) > MOST_VALUES:
            raise ValueError(f"it stands for more than {MOST_VALUES:,} values")
        try:
            return loader.construct_document(root)
        except (ValueError, KeyError) as error:  # `!!int many`, `!!bool maybe`
            raise ValueError(f"not valid YAML: a value is not of its tag's kind ({error})") from None
    finally:
        loader.dispose()


def _values(node: Any, known: dict[int, int | None]) -> int:
    """Return the number of values below a node. `known`: those of the nodes seen, None for one that is not done."""
    if id(node) in known:
        if (number := known[id(node)]) is None:
            raise ValueError(f"line {node.start_mark.line + 1}: refers to itself")
        return number
    known[id(node)] = None
    children: list[Any] = []
    _check_tag(node)
    if node.id == "sequence":
        children = node.value
    elif node.id == "mapping":
        _check_keys(node)
        children = [child for pair in node.value for child in pair]
    known[id(node)] = number = 1 + sum(_values(child, known) for child in children)
    return number


def _check_tag(node: Any) -> None:
    """Raise ValueError for a value that is not plain. A date becomes text, since it may be the name of a file."""
    line = node.start_mark.line + 1
    if node.tag == f"{_TAG}timestamp" and node.id == "scalar":
        node.tag = f"{_TAG}str"
    elif node.tag.startswith(_TAG) and node.tag not in _PLAIN:
        kind = node.tag.removeprefix(_TAG)
        raise ValueError(
            f"line {line}: {kind} is no plain value: give a number, a text, true, false, null, a list or a mapping"
        )
    if node.tag.endswith((":int", ":float")) and re.search(_OTHER_BASE, node.value):
        raise ValueError(f"line {line}: YAML reads {node.value} in base 8 or 60: write it in base 10")
    if node.id == "scalar" and any("\ud800" <= letter <= "\udfff" for letter in node.value):
        raise ValueError(f"line {line}: {node.value!r} has half of a character")


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
