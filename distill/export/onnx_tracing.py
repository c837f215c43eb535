"""Answers of a model to itself that depend on no token: found by running it, and repeated while it is traced.

A model may ask a tensor for its value to choose its path, for example if the positions of a row restart. A tracer has
no values. So the model runs first, at several sizes, with its token ids marked, and the mark passes on to everything
computed from them. If a question to an unmarked tensor has the same answer at every size, it always has this answer,
and the tracer gets it.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

QUESTIONS: dict[Any, str] = {
    getattr(torch.Tensor, name): name for name in ("__bool__", "__int__", "__float__", "__index__", "item")
}


class FromTokens(torch.Tensor):
    """A tensor that was computed from token ids. torch gives this class to all results computed from one."""


class Undecided(Exception):
    """Raised when the model's path depends on the tokens, or on their number."""


class _Ask(TorchFunctionMode):
    """A log of the answers to the model's questions, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[tuple[str, Any]] = []
        """Place of each question in the code, and its answer."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in QUESTIONS:
            return func(*args, **(kwargs or {}))
        asker = sys._getframe(1)
        place = f"{Path(asker.f_code.co_filename).name}, line {asker.f_lineno}"
        if isinstance(args[0], FromTokens):
            raise Undecided(f"{place} asks for a value that depends on the tokens")
        answer = func(*args, **(kwargs or {}))
        self.answers.append((place, answer))
        return answer


class Repeat(TorchFunctionMode):
    """Known answers to the model's questions, given in their order."""

    def __init__(self, answers: Iterable[Any]) -> None:
        super().__init__()
        self._answers = iter(tuple(answers))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in QUESTIONS:
            try:
                return next(self._answers)
            except StopIteration:
                raise Undecided("it takes another path while it is traced") from None
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def answers(forward: Callable[[Tensor], Any], sizes: Iterable[tuple[int, int]], vocabulary: int) -> tuple[Any, ...]:
    """Return the answers of `forward(ids_BL)` to itself, equal at all `sizes` (rows, tokens). Raises Undecided."""
    found: list[list[tuple[str, Any]]] = []
    for rows, tokens in sizes:
        ids_BL = (torch.arange(rows * tokens) * 7 % vocabulary).view(rows, tokens).as_subclass(FromTokens)
        with _Ask() as ask:
            forward(ids_BL)
        found.append(ask.answers)
    for questions in itertools.zip_longest(*found):
        if len(set(questions)) > 1:
            place = next(question[0] for question in questions if question is not None)
            raise Undecided(f"{place} asks for a value that depends on how many tokens there are")
    return tuple(answer for _, answer in found[0])
