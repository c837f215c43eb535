"""Plain values, as YAML and JSON have them, and the type hints that they are to agree with."""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Callable
from typing import Any, Literal


def type_hints(factory: Callable[..., Any]) -> dict[str, Any]:
    """Return the type hints of the call; none if a stranger's annotations cannot be evaluated."""
    target = factory.__init__ if inspect.isclass(factory) else factory
    try:
        return typing.get_type_hints(target)
    except Exception:  # an annotation may name anything, for example a type imported for checkers only
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a plain YAML value agrees with a type hint. Hints unknown here are left to the constructor."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if (origin or hint) in (list, dict):
        inner = args[0] if origin is list else Any
        return isinstance(value, origin or hint) and (origin is not list or all(fits(v, inner) for v in value))
    return True


def is_plain(value: Any) -> bool:
    """Tell whether JSON gives a value back as it is."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError, RecursionError):
        return False
