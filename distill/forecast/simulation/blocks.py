"""Blocks that are alike, of which a simulation runs a few: for the others it is known by then what they do.

Of a model's equal blocks the first two and the last are run. Those between take what the second took going forward and
what the last took going backward. From block to block memory grows or shrinks by the same amount, so that it is highest
at the ends of them, which are run.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only, tree_unflatten

from distill.forecast.simulation.tracker import Storage, Tracker
from distill.forecast.simulation.work import Work, tensors_in
from distill.training.activation_checkpointing import blocks

Place = tuple[int, int]
"""A kind of block, and how often it has been called in this step."""


class NotAlike(Exception):
    """The blocks run in such an order that what one does is not known when it is needed."""


@dataclass
class Forward:
    """Record of a block's forward pass."""

    given: Any
    """Arguments, described."""
    made: Any
    work: Counter[Work]
    left: list[Storage]
    """Storages that it made and that outlived it, less its results."""
    input: Storage | None
    keeps_input: bool | None = None
    """True if its input is kept for its backward pass. None means that the next block's beginning will show it."""


@dataclass
class Backward:
    """Record of a block's backward pass."""

    work: Counter[Work]
    stays: list[bool]
    """True for each storage of `Forward.left` that is still there: weights cast under autocast are, until the end."""


@contextmanager
def alike_once(model: nn.Module, tracker: Tracker) -> Iterator[AlikeBlocks]:
    """Skip some of the model's blocks while entered; may raise `NotAlike` from a backward pass."""
    found = AlikeBlocks(model, tracker)
    forwards = [block.forward for block in found.blocks]
    for index, block in enumerate(found.blocks):
        block.forward = partial(found.run, index, block.forward)
    try:
        yield found
    finally:
        for block, forward in zip(found.blocks, forwards, strict=True):
            block.forward = forward


class AlikeBlocks:
    """The blocks of a model and what is known of them."""

    def __init__(self, model: nn.Module, tracker: Tracker) -> None:
        self.tracker = tracker
        self.blocks = list(blocks(model) or [])
        kinds: dict[Any, list[int]] = defaultdict(list)
        for index, block in enumerate(self.blocks):
            kinds[_kind(block)].append(index)
        self._kind = {index: kind for kind, group in enumerate(kinds.values()) for index in group}
        self._between = {index for group in kinds.values() for index in group[2:-1]}
        self._forward: dict[Place, Forward] = {}
        self._backward: dict[Place, Backward] = {}
        self._unsettled: list[Forward] = []
        self.begin_step()

    def run_all(self) -> None:
        """Run every block from now on."""
        self._between = set()

    def begin_step(self) -> None:
        """Begin another step; what the one before left behind goes."""
        self._calls = [0] * len(self.blocks)
        self._staying: list[Storage] = []

    def end_step(self) -> None:
        """End a step, and what stayed to its end."""
        self.tracker.release(self._staying)
        self.begin_step()

    def run(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block's forward, or repeat what is known of it."""
        place = self._kind[index], self._calls[index]
        self._calls[index] += 1
        living = set(self.tracker.living()) if self._unsettled else set()
        while self._unsettled:
            known = self._unsettled.pop()
            known.keeps_input = known.input in living
        given = tree_map(_describe, (args, kwargs))
        hidden = tensors_in(args, kwargs.values())[0]
        seen = self._forward.get(place)
        if index in self._between and seen is not None and seen.given == given:
            return self._repeat(seen, place, hidden, self.blocks[index])
        return self._record(place, given, hidden, lambda: forward(*args, **kwargs))

    def _record(self, place: Place, given: Any, hidden: Tensor, run: Callable[[], Any]) -> Any:
        tracker = self.tracker
        before, work = set(tracker.living()), Counter(tracker.work)
        made = run()
        results = tensors_in([made])
        out = {tracker.storage_of(tensor) for tensor in results}
        left = [storage for storage in tracker.living() if storage not in before and storage not in out]
        described = tree_map_only(Tensor, _describe, made)
        seen = Forward(given, described, tracker.work - work, left, tracker.storage_of(hidden))
        self._forward[place] = seen
        self._unsettled.append(seen)
        if results[0].requires_grad and hidden.requires_grad:
            started: Counter[Work] = Counter()
            results[0].register_hook(lambda _: started.update(tracker.work))
            hidden.register_hook(lambda _: self._record_backward(place, started, left))
        return made

    def _record_backward(self, place: Place, started: Counter[Work], left: list[Storage]) -> None:
        living = set(self.tracker.living())
        self._backward[place] = Backward(self.tracker.work - started, [storage in living for storage in left])

    def _repeat(self, seen: Forward, place: Place, hidden: Tensor, block: nn.Module) -> Any:
        self.tracker.work.update(seen.work)
        left = [replace(storage, is_kept=True) for storage in seen.left]
        self.tracker.hold(left)
        leaves, structure = tree_flatten(seen.made)
        results = [leaf for leaf in leaves if isinstance(leaf, _Described)]
        if torch.is_grad_enabled() and hidden.requires_grad:
            backward = partial(self._repeat_backward, place, left, block)
            made = iter(_Unrun.apply(hidden, seen.keeps_input, backward, results))
        else:
            self._staying += left
            made = iter([result.empty() for result in results])
        return tree_unflatten([next(made) if isinstance(leaf, _Described) else leaf for leaf in leaves], structure)

    def _repeat_backward(self, place: Place, left: list[Storage], block: nn.Module) -> None:
        known = self._backward.get(place)
        if known is None:
            raise NotAlike
        self.tracker.work.update(known.work)
        self._staying += [storage for storage, stays in zip(left, known.stays, strict=True) if stays]
        self.tracker.release(storage for storage, stays in zip(left, known.stays, strict=True) if not stays)
        for parameter in block.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
                self.tracker.tag([parameter.grad], "gradients")


class _Unrun(torch.autograd.Function):
    """Function with tensors for the results of a block that is not run; it calls `backward` when it is its turn."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, keeps: bool, backward: Callable[[], None], made: list[_Described]) -> Any:
        ctx.hidden, ctx.run, ctx.given = hidden if keeps else None, backward, _describe(hidden)
        return tuple(result.empty() for result in made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.run()
        ctx.hidden = None
        return ctx.given.empty(), None, None, None


@dataclass(frozen=True)
class _Described:
    """A tensor as far as it matters."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool

    def empty(self) -> Tensor:
        """Make one like it."""
        return torch.empty(self.shape, dtype=self.dtype)


def _describe(leaf: Any) -> Any:
    """Describe a tensor by what matters of it, a plain value as it is, all else by its class."""
    if isinstance(leaf, Tensor):
        return _Described(leaf.shape, leaf.dtype, leaf.requires_grad)
    return leaf if isinstance(leaf, (int, float, str, bool, type(None))) else type(leaf)


def _kind(block: nn.Module) -> Any:
    """Return what is equal for blocks that do the same: modules' classes and settings, weights' sizes and types."""
    modules = tuple(
        (name, type(module).__qualname__, type(module).__module__, _settings(module))
        for name, module in block.named_modules()
    )
    weights = tuple(
        (name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
        for name, tensor in (*block.named_parameters(), *block.named_buffers())
    )
    return modules, weights


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Return its settings, but for its number among the blocks; a `forward` of its own too (checkpointing)."""
    told = ((name, _told(value)) for name, value in sorted(vars(module).items()) if name not in _INDICES)
    return tuple(pair for pair in told if pair[1] is not None)


def _told(value: Any) -> Any:
    """Describe plain values as they are and functions by their names; None for what says nothing."""
    if isinstance(value, (int, float, str, bool, torch.dtype)):
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value).__name__, tuple(map(_told, value))
    if isinstance(value, partial):
        return _told(value.func), tuple(map(_told, value.args))
    return getattr(value, "__qualname__", None)


_INDICES = {"layer_idx", "layer_id", "layer_number", "index"}
