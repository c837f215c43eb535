"""Odd values for keys of the experiment file, and odd files as wholes, with the meanings that each may have."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from distill.experiment.configuration import Experiment
from distill.experiment.values import limits_of

ODD: dict[str, Any] = {
    "null": None,
    "true": True,
    "false": False,
    "0": 0,
    "-1": -1,
    "3": 3,
    "0.5": 0.5,
    "-0.0": -0.0,
    "3.0": 3.0,
    "2**31": 2**31,
    "2**53 + 1": 2**53 + 1,
    "2**63": 2**63,
    "2**64": 2**64,
    "-2**63": -(2**63),
    "10**400": 10**400,
    "1e300": 1e300,
    "-1e300": -1e300,
    "5e-324": 5e-324,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "empty": "",
    "blank": "  \t ",
    "text": "nothing of the kind",
    "number as text": "7",
    "nan as text": "nan",
    "null as text": "null",
    "true as text": "true",
    "list as text": "[1]",
    "mapping as text": "{a: 1}",
    "unicode": "naïve 日本語 😀",
    "composed": "e\u0301",
    "right to left": "\u202eabc",
    "NUL": "a\0b",
    "new lines": "a\nb\r\nc",
    "escape": "\x1b[31mred",
    "half a pair": "\ud800",
    "long": "x" * 100_000,
    "name of 256 bytes": "x" * 256,
    "name of 255 letters": "é" * 255,
    "path up": "../../../../etc/passwd",
    "home": "~",
    "variable": "$HOME/x",
    "URL": "https://localhost:1/x",
    "digits": "9" * 400,
    "size of many digits": "9" * 400 + "GB",
    "time of many digits": "9" * 5000 + "d",
    "part of many digits": "9" * 20 + "/" + "9" * 20,
    "device": "/dev/null",
    "dashes": "--cache.seed",
    "list": [],
    "list of null": [None],
    "list of lists": [[[]]],
    "list of numbers": [1, 2.5, -3],
    "list of one": [3],
    "list of truth": [True],
    "list of text": ["a", ""],
    "mapping": {},
    "mapping of null": {"a": None},
    "mapping of numbers": {1: 2},
    "class_path": {"class_path": "os.system"},
    "init_args": {"class_path": "os.system", "init_args": {"command": "true"}},
}

RAW: dict[str, tuple[Any, ...]] = {
    "1_000": (1000, "1_000"),
    "0x10": (16, "0x10"),
    "0b11": (3, "0b11"),
    "010": ("010",),
    "0o17": (15, "0o17"),
    "1e400": ("1e400",),
    "1e3": (1000, "1e3"),
    "1E-3": (0.001, "1E-3"),
    "1e-400": (0.0, "1e-400"),
    "1.": (1.0, "1."),
    ".5": (0.5, ".5"),
    "+3": (3, "+3"),
    "3,5": ("3,5",),
    "1/2": ("1/2",),
    "50%": ("50%",),
    "1:30": ("1:30",),
    "١٢": (12, "١٢"),
    "３": (3, "３"),
    '"3"': (3, "3"),
    '" 3 "': (3, " 3 "),
    '"0x10"': (16, "0x10"),
    '"1e3"': (1000, "1e3"),
    '"1_000"': (1000, "1_000"),
    "9007199254740993": (9007199254740993,),
    "yes": (True,),
    "no": (False,),
    "off": (False,),
    "y": ("y",),
    "TRUE": (True,),
    "tRue": (True, "tRue"),
    '"yes"': (True, "yes"),
    "~": (None,),
    "Null": (None,),
    '"null"': ("null",),
    '"~"': ("~",),
    "2026-11-30": ("2026-11-30",),
    "2026-11-30T10:00:00Z": ("2026-11-30T10:00:00Z",),
    "2026-1-1 1:00:00": ("2026-1-1 1:00:00",),
    "infinity": ("infinity",),
    ".inf": (),
    "-.INF": (),
    "!!str 3": (3, "3"),
    '!!int "3"': (3,),
    "!!int 3.0": (3,),
    "!!float 3": (3.0,),
    "!!bool maybe": (),
    "!!binary aGVsbG8=": (),
    "!!set {a}": (),
    "!!omap [a: 1]": (),
    "!!pairs [a: 1]": (),
    "!!timestamp 2001": (2001, "2001"),
    "!!python/name:os.system": (),
    "!!python/object/apply:os.system [id]": (),
    "!own 3": (),
    "&a 3": (3,),
    "*nowhere": (),
    "&a [*a]": (),
    "3 # of them": (3,),
    '"3 # of them"': ("3 # of them",),
    "{<<: {a: 1}}": ({"a": 1},),
    "[1, 2": (),
    '"\\ud83d"': (),
    "@home": (),
    "`ls`": (),
    "a: b": (),
}
"""YAML as it is written behind a key, and all values that it can mean to the one who wrote it."""


@dataclass(frozen=True)
class Key:
    """A key of the file, such as `train.epochs`, and its type."""

    name: str
    hint: Any


def keys() -> Iterator[Key]:
    """Yield all keys, sections too."""
    for section, kind in typing.get_type_hints(Experiment, include_extras=True).items():
        yield Key(section, kind)
        if dataclasses.is_dataclass(kind):
            hints = typing.get_type_hints(kind, include_extras=True)
            yield from (Key(f"{section}.{name}", hint) for name, hint in hints.items())


def own_values(key: Key) -> dict[str, Any]:
    """Return values at and just beyond a key's limits, all choices, and each choice written oddly."""
    values: dict[str, Any] = {}
    for choice in _choices(key.hint):
        values |= {f"choice {form!r}": form for form in (choice, choice.upper(), choice.title(), f"{choice} ")}
    limits = limits_of(key.hint)
    if limits is not None:
        step = 1e-9 if float in _kinds(key.hint) else 1
        for name, value in {"low": limits.low, "high": limits.high}.items():
            outside = value - step if name == "low" else value + step * max(1, abs(value) if step < 1 else 1)
            values |= {name: value, f"beyond {name}": outside}
    if list in _kinds(key.hint):
        values = {name: [value] for name, value in values.items()}
    return values


def _choices(hint: Any) -> tuple[str, ...]:
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    return tuple(choice for inner in typing.get_args(hint) for choice in _choices(inner))


def _kinds(hint: Any) -> set[Any]:
    """Return the plain types that a hint names at its top, whatever they are annotated with."""
    if typing.get_origin(hint) is typing.Annotated:
        return _kinds(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return set().union(*map(_kinds, typing.get_args(hint)))
    return {typing.get_origin(hint) or hint}


SAME, REFUSED = "same", "refused"
_HEAD = "corpus: {path: data}\nteacher: {model: smollm2-135m-demo}\n"
WHOLE: dict[str, tuple[str, bytes]] = {
    "plain": (SAME, f"{_HEAD}train: {{epochs: 3}}\n".encode()),
    "byte-order mark": (SAME, f"\ufeff{_HEAD}train: {{epochs: 3}}\n".encode()),
    "two byte-order marks": (REFUSED, f"\ufeff\ufeff{_HEAD}".encode()),
    "CRLF": (SAME, f"{_HEAD}train:\n  epochs: 3\n".replace("\n", "\r\n").encode()),
    "CR": (SAME, f"{_HEAD}train:\n  epochs: 3\n".replace("\n", "\r").encode()),
    "UTF-16": (REFUSED, f"{_HEAD}train: {{epochs: 3}}\n".encode("utf-16")),
    "UTF-16 without a mark": (REFUSED, f"{_HEAD}train: {{epochs: 3}}\n".encode("utf-16-le")),
    "UTF-32": (REFUSED, f"{_HEAD}train: {{epochs: 3}}\n".encode("utf-32")),
    "latin-1": (REFUSED, f"{_HEAD}run_dir: é\n".encode("latin-1")),
    "zeros": (REFUSED, bytes(4096)),
    "noise": (REFUSED, bytes(range(256))),
    "empty": (REFUSED, b""),
    "comment": (REFUSED, b"# nothing\n"),
    "tab": (REFUSED, f"{_HEAD}train:\n\tepochs: 3\n".encode()),
    "tab behind": (REFUSED, f"{_HEAD}train:\n  epochs:\t3\t\n".encode()),
    "anchor and alias": (
        SAME,
        f"{_HEAD}cache: {{entries: &n 3}}\ntrain: {{epochs: *n}}\n".encode(),
    ),
    "merge": (REFUSED, f"{_HEAD}all: &all {{epochs: 3}}\ntrain: {{<<: *all}}\n".encode()),
    "merge in place": (SAME, f"{_HEAD}train: {{<<: {{epochs: 3}}}}\n".encode()),
    "merge below": (SAME, f"{_HEAD}train: {{<<: {{epochs: 4}}, epochs: 3}}\n".encode()),
    "merge of a number": (REFUSED, f"{_HEAD}train: {{<<: 3}}\n".encode()),
    "merge of itself": (REFUSED, f"{_HEAD}train: &t {{<<: *t, epochs: 3}}\n".encode()),
    "document marks": (SAME, f"%YAML 1.1\n---\n{_HEAD}train: {{epochs: 3}}\n...\n".encode()),
    "two documents": (REFUSED, f"{_HEAD}---\ntrain: {{epochs: 3}}\n".encode()),
    "YAML 3": (REFUSED, f"%YAML 3.0\n---\n{_HEAD}".encode()),
    "tag of the whole": (REFUSED, f"!!python/object:os.system\n{_HEAD}".encode()),
    "key twice": (REFUSED, f"{_HEAD}train: {{epochs: 4, epochs: 3}}\n".encode()),
    "key twice in quotes": (REFUSED, f'{_HEAD}train: {{epochs: 4, "epochs": 3}}\n'.encode()),
    "section twice": (REFUSED, f"{_HEAD}train: {{epochs: 4}}\ntrain: {{epochs: 3}}\n".encode()),
    "key in quotes": (SAME, f"{_HEAD}'train': {{? epochs : 3}}\n".encode()),
    "key in capitals": (REFUSED, f"{_HEAD}Train: {{epochs: 3}}\n".encode()),
    "key with a blank": (REFUSED, f'{_HEAD}"train ": {{epochs: 3}}\n'.encode()),
    "key with dots": (REFUSED, f"{_HEAD}train.epochs: 3\n".encode()),
    "key with a dash": (REFUSED, f"{_HEAD}train: {{batch-size: 3}}\n".encode()),
    "key of another alphabet": (REFUSED, f"{_HEAD}train: {{еpochs: 3}}\n".encode()),
    "key is a number": (REFUSED, f"{_HEAD}3: {{epochs: 3}}\n".encode()),
    "key is null": (REFUSED, f"{_HEAD}~: {{epochs: 3}}\n".encode()),
    "key is a list": (REFUSED, f"{_HEAD}? [train]\n: {{epochs: 3}}\n".encode()),
    "key is a mapping": (REFUSED, f"{_HEAD}? {{train: 1}}\n: 3\n".encode()),
    "key is a date": (REFUSED, f"{_HEAD}train: {{2026-11-30: 3}}\n".encode()),
    "key of a megabyte": (REFUSED, f"{_HEAD}{'x' * 500_000}: 3\n".encode()),
    "key with control characters": (REFUSED, f'{_HEAD}"a\\e[31m\\nb": 3\n'.encode()),
    "value in two lines": (SAME, f"{_HEAD}train:\n  epochs:\n    3\n".encode()),
    "no space": (REFUSED, f"{_HEAD}train: {{epochs:3}}\n".encode()),
    "JSON": (SAME, b'{"corpus": {"path": "data"}, "teacher": {"model": "smollm2-135m-demo"}, "train": {"epochs": 3}}'),
    "INI": (REFUSED, b"[train]\nepochs = 3\n"),
    "TOML": (REFUSED, b'corpus.path = "data"\n'),
    "a list of sections": (REFUSED, b"- corpus: {path: data}\n- teacher: {model: smollm2-135m-demo}\n"),
    "a section is a list": (REFUSED, f"{_HEAD}train:\n  - epochs: 3\n".encode()),
    "a section is text": (REFUSED, f"{_HEAD}train: epochs 3\n".encode()),
    "deep": (REFUSED, ("[" * 10_000).encode()),
    "deep in options": (REFUSED, f"{_HEAD}student: {{options: {{a: {'[' * 3000}{']' * 3000}}}}}\n".encode()),
    "many references": (
        REFUSED,
        (_HEAD + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 9)}]\n" for n in range(12))).encode(),
    ),
    "many values": (REFUSED, f"{_HEAD}evaluate: {{tasks: [{'a, ' * 200_000}]}}\n".encode()),
    "two megabytes": (REFUSED, (_HEAD + "#" * 2**21).encode()),
}
"""Whole files, and whether each means the same as the plain one (three epochs) or is refused."""
