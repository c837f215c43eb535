"""Callbacks of the user's own: found by name, refused in one message, and part of what a resumed training continues."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from distill import plugins
from distill.errors import UserError
from distill.training.user_callbacks import check_callbacks, make_callbacks

SOURCE = """
import lightning.pytorch as pl

MADE = []

class Shrink(pl.Callback):
    def __init__(self, share: float = 0.5, power: int = 1) -> None:
        MADE.append(self)
        self.share, self.power = share, power

class Careless(pl.Callback):
    def __init__(self) -> None:
        raise ValueError("no file there")

class Bar(pl.callbacks.TQDMProgressBar):
    pass

class Plain:
    pass

def function():
    return Shrink()
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "own.py"
    path.write_text(SOURCE)
    return str(path)


def test_by_name_and_with_arguments(file: str) -> None:
    entries = [f"{file}:Shrink", "lightning.pytorch.callbacks:LearningRateMonitor"]
    first, second = make_callbacks(entries)
    assert (first.share, first.power) == (0.5, 1) and type(second).__name__ == "LearningRateMonitor"  # type: ignore[attr-defined]
    (given,) = make_callbacks([{"class_path": f"{file}:Shrink", "init_args": {"share": 0.1}}])
    assert given.share == 0.1  # type: ignore[attr-defined]


def test_checking_makes_none(file: str) -> None:
    check_callbacks([f"{file}:Shrink", f"{file}:Careless"])
    module = sys.modules[plugins.load(f"{file}:Shrink", "callback").__module__]
    assert module.MADE == []
    make_callbacks([f"{file}:Shrink"])
    assert len(module.MADE) == 1


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("FILE:Schrink", ("has no 'Schrink'", "did you mean 'Shrink'")),
        ("FILE", ("give package.module:Class or path/file.py:Class",)),
        ("Shrink", ("'Shrink': unknown, or give package.module:Class",)),
        ("FILES:Shrink", ("no file", "own.py")),
        ("no.such.module:Shrink", ("no module",)),
        ("FILE:Plain", ("Plain is not a subclass of lightning.pytorch.Callback",)),
        ("FILE:function", ("function is not a subclass",)),
        ("FILE:Bar", ("Bar is a ProgressBar", "leave it out")),
        ("lightning.pytorch.callbacks:ModelCheckpoint", ("train.checkpoint_every_steps",)),
        ({"class_path": "FILE:Shrink", "init_arg": {}}, ("init_arg: unknown key; did you mean 'init_args'",)),
        ({"class_path": "FILE:Shrink", "init_args": {"part": 1}}, ("init_args of", "unknown option 'part'", "share")),
        ({"class_path": "FILE:Shrink", "init_args": {"power": "big"}}, ("power: expected int",)),
        ({"class_path": "FILE:Shrink", "init_args": 3}, ("a mapping init_args",)),
        ({"init_args": {}}, ("class_path",)),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(file: str, entry: Any, words: tuple[str, ...]) -> None:
    text = json.dumps(entry).replace("FILES", file.replace("own.py", "owns.py")).replace("FILE", file)
    with pytest.raises(UserError) as refused:
        check_callbacks([json.loads(text)])
    assert str(refused.value).startswith("train.callbacks") and all(word in str(refused.value) for word in words)


def test_a_constructor_that_fails_and_a_class_named_twice(file: str) -> None:
    with pytest.raises(UserError, match=r"Careless: its constructor failed: .*no file there \(own.py, line 13\)"):
        make_callbacks([f"{file}:Careless"])
    with pytest.raises(UserError, match="Shrink stands there twice"):
        make_callbacks([f"{file}:Shrink", f"{file}:Shrink"])
