"""A shortcut for equal blocks: a simulation runs a few of them, and repeats their memory and work for the others.

Of a model's equal blocks the first two and the last are run. The blocks between repeat the second one's forward and the
last one's backward. From block to block memory grows or shrinks by the same amount, so it is highest at the first or
the last of them, which are run. Without gradients, two neighbouring experts of a block stand for all of as many tokens.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from distill.forecast.simulation.repetition import first_two_alike
from distill.forecast.simulation.tracker import Storage, Tracker
from distill.forecast.simulation.work import Work, tensors_in
from distill.training.activation_checkpointing import blocks

Place = tuple[int, int]
"""A kind of block, and the number of its calls so far in this step."""


class NotAlike(Exception):
    """Raised when the blocks run in such an order that one's behaviour is unknown when it is needed."""


@dataclass
class Forward:
    """A block's forward pass."""

    given: Any
    """Arguments of the block, described."""
    made: Any
    work: Counter[Work]
    left: list[Storage]
    """Storages that it made and that outlived it, without its results."""
    input: Storage | None
    keeps_input: bool | None = None
    """True if its input is kept for its backward pass. None until the next block begins, when this shows."""


@dataclass
class Backward:
    """A block's backward pass."""

    work: Counter[Work]
    stays: list[bool]
    """Flags of the storages in `Forward.left`: True if one is still there (weights cast under autocast)."""


@contextmanager
def alike_once(model: nn.Module, tracker: Tracker) -> Iterator[AlikeBlocks]:
    """Skip some of the model's blocks, and of their experts, inside. A backward pass may raise `NotAlike`."""
    found = AlikeBlocks(model, tracker)
    forwards = [block.forward for block in found.blocks]
    for index, block in enumerate(found.blocks):
        block.forward = partial(found.run, index, block.forward)
    walks: list[tuple[Any, Any]] = [
        (module, module.each_expert) for module in model.modules() if hasattr(module, "each_expert")
    ]
    for experts, _ in walks:
        experts.each_expert = found.each_expert
    try:
        yield found
    finally:
        for experts, walk in walks:
            experts.each_expert = walk
        for block, forward in zip(found.blocks, forwards, strict=True):
            block.forward = forward


class AlikeBlocks:
    """The blocks of a model, and the passes of those that were run."""

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
        self._runs_all = False
        self.begin_step()

    def run_all(self) -> None:
        """Run every block and every expert from now on."""
        self._between, self._runs_all = set(), True

    def each_expert(self, experts: Iterable[tuple[int, int]]) -> Iterable[tuple[int, int]]:
        """Yield the experts of a block, number and tokens, that are to be run."""
        if self._runs_all or torch.is_grad_enabled():  # with gradients, each one leaves activations behind
            return experts
        return first_two_alike(experts, self.tracker, lambda expert: expert[1])

    def begin_step(self) -> None:
        """Begin another step, and forget the storages that the step before left."""
        self._calls = [0] * len(self.blocks)
        self._staying: list[Storage] = []

    def end_step(self) -> None:
        """Release the storages that stayed to the end of a step."""
        self.tracker.release(self._staying)
        self.begin_step()

    def run(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block's forward, or repeat a known one in its place."""
        place = self._kind[index], self._calls[index]
        self._calls[index] += 1
        living = set(self.tracker.living()) if self._unsettled else set()
        while self._unsettled:
            known = self._unsettled.pop()
            known.keeps_input = known.input in living
        tensors = tensors_in(args, kwargs.values())
        if not tensors:
            return forward(*args, **kwargs)
        given, hidden = tree_map(_describe, (args, kwargs)), tensors[0]
        seen = self._forward.get(place)
        if index in self._between and seen is not None and seen.given == given:
            return self._repeat(seen, place, hidden, self.blocks[index])
        return self._record(place, given, hidden, lambda: forward(*args, **kwargs))

    def _record(self, place: Place, given: Any, hidden: Tensor, run: Callable[[], Any]) -> Any:
        tracker = self.tracker
        before, work = set(tracker.living()), Counter(tracker.work)
        made = run()
        results = tensors_in([made])
        if not results or not all(_is_described(leaf) for leaf in tree_leaves(made)):  # such as a function
            return made
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
    """Tensors for the results of a block that is not run. It calls `backward` when its turn comes."""

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
    """The shape, type and gradient flag of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool

    def empty(self) -> Tensor:
        """Return an empty tensor like it."""
        return torch.empty(self.shape, dtype=self.dtype)


def _describe(leaf: Any) -> Any:
    """Describe a tensor by its properties, a plain value by itself, all else by its class."""
    if isinstance(leaf, Tensor):
        return _Described(leaf.shape, leaf.dtype, leaf.requires_grad)
    return leaf if _is_described(leaf) else type(leaf)


def _is_described(leaf: Any) -> bool:
    """Tell whether a leaf's description makes another leaf like it."""
    return isinstance(leaf, (Tensor, int, float, str, bool, type(None)))


def _kind(block: nn.Module) -> Any:
    """Return a value that is equal for equal blocks: modules' classes and settings, weights' sizes and types."""
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
    """Return a module's settings without its number among the blocks, but with its own `forward` (checkpointing)."""
    told = ((name, _told(value)) for name, value in sorted(vars(module).items()) if name not in _INDICES)
    return tuple(pair for pair in told if pair[1] is not None)


def _told(value: Any) -> Any:
    """Return plain values unchanged, functions by their names, and None for anything else."""
    if isinstance(value, (int, float, str, bool, torch.dtype)):
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value).__name__, tuple(map(_told, value))
    if isinstance(value, partial):
        return _told(value.func), tuple(map(_told, value.args))
    return getattr(value, "__qualname__", None)


_INDICES = {"layer_idx", "layer_id", "layer_number", "index"}
