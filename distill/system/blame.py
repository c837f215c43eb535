"""One line for an error in a user's own code: its message, and the file and line of theirs that led to it."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

from distill.errors import UserError
from distill.system.interrupt import Interrupted

_ROOT = Path(__file__).resolve().parents[2]
_OURS = tuple(f"{_ROOT / name}{os.sep}" for name in ("distill", "students", "teachers"))
_PYTHON = sysconfig.get_paths()["stdlib"] + os.sep
_INSTALLED = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
_LIBRARIES = ("torch", "lightning", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "numpy")


def blame(error: BaseException, function: Any = None) -> str:
    """Return `"TypeError: its message (my_student.py, line 31)"`.

    The line is the last one outside of Python, distill and the libraries beneath it. An error that no such line led to
    is one of the call itself (too many arguments, say): then it is the line where `function` begins.
    """
    what, place = _what(error), place_of(error)
    code = getattr(function, "__code__", None)
    if place is None and isinstance(code, CodeType) and _is_theirs(code.co_filename):
        place = f"{os.path.basename(code.co_filename)}, line {code.co_firstlineno}"
    # A syntax error says itself where it is.
    return what if place is None or isinstance(error, SyntaxError) else f"{what} ({place})"


def place_of(error: BaseException) -> str | None:
    """Return `"my_student.py, line 31"` for an error that a line of the user's led to; None for all others."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if _is_theirs(frame.filename):
            return f"{os.path.basename(frame.filename)}, line {frame.lineno}"
    return None


@contextmanager
def blamed(name: str) -> Iterator[None]:
    """Turn an exception that a line of the user's led to into a UserError with that line; let all others pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if place_of(error) is None:
            raise
        raise UserError(
            f"{name}: code of yours failed: {blame(error)}; mend it; what is done is kept: go on with --resume"
        ) from error


def failed(error: BaseException) -> bool:
    """Tell whether an exception is no wish to stop. A native extension's panic is a failure, though no `Exception`."""
    return not isinstance(error, (KeyboardInterrupt, Interrupted, GeneratorExit))


def _what(error: BaseException) -> str:
    try:
        text = str(error).strip()
    except Exception:  # of a class of theirs
        text = ""
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__


def _is_theirs(file: str) -> bool:
    if file.startswith(("<", *_OURS)):
        return False
    for folder in _INSTALLED:
        if folder in file:
            return file.rpartition(folder)[2].split(os.sep)[0] not in _LIBRARIES
    return not file.startswith(_PYTHON)
