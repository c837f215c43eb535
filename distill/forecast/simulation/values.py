"""Values of small fake tensors: what follows from a batch is computed, what follows from weights is taken to be fine.

A fake tensor has no values, yet a step asks for some: how many positions a pass has, whether documents are packed,
whether the loss is finite. Tensors that come from the batch alone (ids, positions, masks) carry their values along.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from distill.forecast.simulation.work import tensors_in
from distill.system import interrupt

aten = torch.ops.aten
LARGEST = 2**22
"""Values of a tensor that are still carried along."""
MOST_GUESSES = 10_000
"""Unknown values that a program may ask for. One that asks for more waits, in a loop, for what never comes."""


class Values(TorchDispatchMode):
    """Answers what the program asks of fake tensors. To be entered after (above) `fake`."""

    def __init__(self, fake: FakeTensorMode, integer: int = 1) -> None:
        """Make the mode; `integer`: what a whole number is taken to be that does not follow from the batch.

        After `MOST_GUESSES` values of that kind what asks for another gets a RuntimeError.
        """
        super().__init__()
        self.fake, self.integer = fake, integer
        self._guesses = 0

    def known(self, real: Tensor) -> Tensor:
        """Return a fake tensor that carries the values of a real one."""
        return _with_value(self.fake.from_tensor(real), real)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(has_own_dispatch(kind) for kind in types):
            return NotImplemented
        interrupt.stop_if_asked()  # here an exception is as good as one of torch's own
        kwargs = kwargs or {}
        if func in (aten._local_scalar_dense.default, aten.equal.default):
            return self._answer(func, args)
        if func is aten.nonzero.default:
            with unset_fake_temporarily():
                places = _value_or_ones(args[0]).nonzero()
            return self.known(places)
        if func is aten.masked_select.default:
            args, func = (args[0], [args[1]]), aten.index.Tensor
        if func is aten.index.Tensor:
            args = args[0], [place for index in args[1] for place in self._places(index)]
        made = func(*args, **kwargs)
        self._follow(func, args, kwargs, made)
        return made

    def _answer(self, func: Any, args: Any) -> Any:
        """Answer with the value, or with true or 1 for what is not known: finite, not empty, equal."""
        values = [_value(tensor) for tensor in args]
        if all(value is not None for value in values):
            with unset_fake_temporarily():
                return func(*values)
        self._guesses += 1
        if self._guesses > MOST_GUESSES:
            raise RuntimeError("it asks for more and more values that depend on weights: a loop that ends by them?")
        if func is aten.equal.default or args[0].dtype == torch.bool:
            return True
        return 1.0 if args[0].dtype.is_floating_point else self.integer

    def _places(self, index: Tensor | None) -> list[Tensor | None]:
        """Turn a mask into the positions where it holds."""
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            return [index]
        with unset_fake_temporarily():
            places = _value_or_ones(index).nonzero().unbind(1)
        return [self.known(place) for place in places]

    def _follow(self, func: Any, args: Any, kwargs: Any, made: Any) -> None:
        """Compute the result's values too, where all that goes in is known; forget those of what is changed else."""
        given, results = tensors_in(args, kwargs.values()), tensors_in([made])
        if not _is_determined(given, results) or any(tensor.numel() > LARGEST for tensor in results):
            named = zip(func._schema.arguments, args, strict=False)
            changed = [value for argument, value in named if argument.alias_info and argument.alias_info.is_write]
            for tensor in (*results, *tensors_in(changed)):
                _with_value(tensor, None)
            if func._overloadpacket is aten.any:  # nothing is out of its place: torch's trunc_normal_ asks till then
                with unset_fake_temporarily():
                    _with_value(made, torch.zeros(made.shape, dtype=torch.bool))
            return
        with unset_fake_temporarily():  # what is changed in place changes its values in place
            values = func(*tree_map_only(Tensor, _value, args), **tree_map_only(Tensor, _value, kwargs))
        for result, value in zip(tree_leaves(made), tree_leaves(values), strict=True):
            if isinstance(result, Tensor):
                _with_value(result, value)


def has_own_dispatch(kind: Any) -> bool:
    """Tell if a class of tensors is made of other tensors, and tells torch what to do with those."""
    return kind is not FakeTensor and kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


class Methods(TorchFunctionMode):
    """Methods of fake tensors: `numpy()` gives the values where they are known, else zeros; a deep copy is a clone.

    `requires_grad_` is the last call before `nn.Module.to` swaps a parameter for a new one, which torch refuses where
    the fake mode's memo has weak references to them: the memo is emptied.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self._memo = fake.fake_tensor_converter.tensor_memo

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.requires_grad_:
            self._memo.clear()
        if func is Tensor.__deepcopy__ and isinstance(args[0], FakeTensor):
            return args[0].clone()
        if func is Tensor.numpy and isinstance(args[0], FakeTensor):
            value = _value(args[0])
            with unset_fake_temporarily():
                return (torch.zeros(args[0].shape, dtype=args[0].dtype) if value is None else value).numpy()
        return func(*args, **(kwargs or {}))


def _is_determined(given: list[Tensor], results: Any) -> bool:
    if given:
        return all(_value(tensor) is not None for tensor in given)
    # A mask or an arange, not the zeros of a weight.
    return bool(results) and not any(result.dtype.is_floating_point for result in results)


def _value(tensor: Tensor) -> Tensor | None:
    return getattr(tensor, "_known_value", None) if isinstance(tensor, FakeTensor) else tensor


def _value_or_ones(tensor: Tensor) -> Tensor:
    value = _value(tensor)
    return torch.ones(tensor.shape, dtype=torch.bool) if value is None else value


def _with_value(tensor: Tensor, value: Tensor | None) -> Tensor:
    if value is not None or hasattr(tensor, "_known_value"):
        tensor._known_value = value  # type: ignore[attr-defined]
    return tensor
