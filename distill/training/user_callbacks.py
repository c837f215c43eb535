"""Lightning callbacks of the user's own, named in the experiment file: tried early, made when a training begins."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, ProgressBar

from distill import plugins
from distill.errors import UserError, did_you_mean
from distill.system.blame import blame

Entry = str | Mapping[str, Any]
"""`module:Class` or `file.py:Class`, or a mapping of `class_path` (such a name) and `init_args` (its arguments)."""


def check_callbacks(entries: Sequence[Entry]) -> None:
    """Raise UserError for a name, a class or an argument that no callback can be made of. Nothing is made yet."""
    for entry in entries:
        _class_and_arguments(entry)


def make_callbacks(entries: Sequence[Entry]) -> list[pl.Callback]:
    """Construct the callbacks, in the order in which Lightning will call them.

    Raise UserError as `check_callbacks` does, for a constructor that fails, and for two callbacks whose states a
    checkpoint could not tell apart.
    """
    made: dict[str, pl.Callback] = {}
    for entry in entries:
        name, kind, arguments = _class_and_arguments(entry)
        try:
            callback = kind(**arguments)
        except Exception as error:  # a stranger's constructor may fail in any way
            raise UserError(
                f"train.callbacks: {name}: its constructor failed: {blame(error, kind.__init__)}"
            ) from error
        if callback.state_key in made:
            raise UserError(f"train.callbacks: {name} stands there twice: give the class a `state_key` of its own each")
        made[callback.state_key] = callback
    return list(made.values())


def _class_and_arguments(entry: Entry) -> tuple[str, type[pl.Callback], dict[str, Any]]:
    given = {"class_path": entry} if isinstance(entry, str) else dict(entry)
    for key in given:
        if key not in _KEYS:
            raise UserError(f"train.callbacks: {key}: unknown key{did_you_mean(str(key), _KEYS)}")
    name, options = given.get("class_path"), given.get("init_args") or {}
    if not isinstance(name, str) or not isinstance(options, dict):
        raise UserError(f"train.callbacks: {entry!r}: give {plugins.FORMS}, or class_path with a mapping init_args")
    kind = plugins.load(name, "callback")
    if not (inspect.isclass(kind) and issubclass(kind, pl.Callback)):
        raise UserError(f"train.callbacks: {name} is not a subclass of lightning.pytorch.Callback")
    for base, whose in _TAKEN.items():
        if issubclass(kind, base):
            raise UserError(f"train.callbacks: {name} is a {base.__name__}: leave it out, {whose}")
    return name, kind, plugins.arguments(name, "callback", options, {})


_KEYS = ("class_path", "init_args")
_TAKEN = {
    Checkpoint: "train.checkpoint_every_steps and train.keep_checkpoints say which checkpoints are written",
    ProgressBar: "the training shows one already",
}
