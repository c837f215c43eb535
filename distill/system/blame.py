"""One line for an error in a user's own code: what it says, and the file and line of theirs that led to it."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path
from types import CodeType
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_OURS = tuple(f"{_ROOT / name}{os.sep}" for name in ("distill", "students", "teachers"))
_PYTHON = sysconfig.get_paths()["stdlib"] + os.sep
_INSTALLED = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
_LIBRARIES = ("torch", "lightning", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "numpy")


def blame(error: BaseException, function: Any = None) -> str:
    """Return `"TypeError: what it says (my_student.py, line 31)"`.

    The line is the last one outside of Python, distill and the libraries beneath it. An error that no such line led to
    is one of the call itself (too many arguments, say): then it is the line where `function` begins.
    """
    text = str(error).strip()
    what = f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__
    if isinstance(error, SyntaxError):  # it says itself where
        return what
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if _is_theirs(frame.filename):
            return f"{what} ({os.path.basename(frame.filename)}, line {frame.lineno})"
    code = getattr(function, "__code__", None)
    if isinstance(code, CodeType) and _is_theirs(code.co_filename):
        return f"{what} ({os.path.basename(code.co_filename)}, line {code.co_firstlineno})"
    return what


def _is_theirs(file: str) -> bool:
    if file.startswith(("<", *_OURS)):
        return False
    for folder in _INSTALLED:
        if folder in file:
            return file.rpartition(folder)[2].split(os.sep)[0] not in _LIBRARIES
    return not file.startswith(_PYTHON)
