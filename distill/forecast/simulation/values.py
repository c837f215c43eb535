"""Values of small fake tensors: those that follow from a batch are computed, those that follow from weights assumed.

A fake tensor has no values, yet a step asks for some: the number of positions in a pass, whether documents are packed,
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

from distill.forecast.simulation.kernels import grouped_product
from distill.forecast.simulation.work import tensors_in
from distill.system import interrupt

aten = torch.ops.aten
LARGEST = 2**22
"""Largest number of values of a tensor that carries them along."""
MOST_EXPERTS = 1024
"""Largest number of experts of a mixture, as far as a choice among values is taken to be its router's."""
MOST_GUESSES = 10_000
"""Largest number of unknown values that a program may ask for. One that asks for more is in an endless loop."""


class Values(TorchDispatchMode):
    """A mode that answers the program's questions to fake tensors. It is entered after (above) `fake`."""

    def __init__(self, fake: FakeTensorMode, integer: int = 1) -> None:
        """Set up the mode; `integer` is the assumed value of a whole number that does not follow from the batch.

        After `MOST_GUESSES` such values, the next question gets a RuntimeError.
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
        interrupt.stop_if_asked()  # an exception is safe here, as one of torch's own is
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
        # Fake tensors refuse grouped products in other types than bfloat16.
        made = grouped_product(*args, **kwargs) if func is aten._grouped_mm.default else func(*args, **kwargs)
        self._follow(func, args, kwargs, made)
        if func is aten.topk.default and _value(args[0]) is None:
            _choose_evenly(made[1], args[0].shape[-1])
        return made

    def _answer(self, func: Any, args: Any) -> Any:
        """Return an answer. Unknown values are true, or 1: finite, not empty, equal."""
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
        """Return a mask as the positions where it is True."""
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            return [index]
        with unset_fake_temporarily():
            places = _value_or_ones(index).nonzero().unbind(1)
        return [self.known(place) for place in places]

    def _follow(self, func: Any, args: Any, kwargs: Any, made: Any) -> None:
        """Compute the result's values too if all arguments are known; else forget the values of changed tensors."""
        given, results = tensors_in(args, kwargs.values()), tensors_in([made])
        if not _is_determined(given, results) or any(tensor.numel() > LARGEST for tensor in results):
            named = zip(func._schema.arguments, args, strict=False)
            changed = [value for argument, value in named if argument.alias_info and argument.alias_info.is_write]
            for tensor in (*results, *tensors_in(changed)):
                _with_value(tensor, None)
            if func._overloadpacket is aten.any:  # False: torch's trunc_normal_ repeats until none is outside
                with unset_fake_temporarily():
                    _with_value(made, torch.zeros(made.shape, dtype=torch.bool))
            return
        with unset_fake_temporarily():  # an in-place kernel changes the known values in place too
            values = func(*tree_map_only(Tensor, _value, args), **tree_map_only(Tensor, _value, kwargs))
        for result, value in zip(tree_leaves(made), tree_leaves(values), strict=True):
            if isinstance(result, Tensor):
                _with_value(result, value)


def _choose_evenly(chosen: Tensor, experts: int) -> None:
    """Give unknown choices among the last dimension's values a router's: each expert is chosen as often.

    Experts that run one by one ask for the numbers of their tokens, which sum to the real ones in this way.
    """
    if chosen.dim() > 1 and chosen.shape[-1] <= experts <= MOST_EXPERTS and chosen.numel() <= LARGEST:
        with unset_fake_temporarily():
            _with_value(chosen, (torch.arange(chosen.numel()) % experts).reshape(chosen.shape))


def has_own_dispatch(kind: Any) -> bool:
    """Tell whether a class of tensors is made of other tensors, and handles torch's calls itself."""
    return kind is not FakeTensor and kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


class Methods(TorchFunctionMode):
    """Methods of fake tensors: `numpy()` gives the values if known, else zeros; a deep copy is a clone.

    `torch.tensor` of a list of tensors reads their memory past torch's dispatcher, so it gets a list of numbers.
    `requires_grad_` is the last call before `nn.Module.to` swaps a parameter for a new one. torch refuses that if the
    fake mode's memo has weak references to them, so the memo is emptied.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self._memo = fake.fake_tensor_converter.tensor_memo

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.requires_grad_:
            self._memo.clear()
        if func is Tensor.__deepcopy__ and isinstance(args[0], FakeTensor):
            return args[0].clone()
        if func in (torch.tensor, torch.as_tensor) and args and not isinstance(args[0], Tensor):
            args, kwargs = _as_numbers(args, kwargs or {})
        if func is Tensor.numpy and isinstance(args[0], FakeTensor):
            value = _value(args[0])
            with unset_fake_temporarily():
                return (torch.zeros(args[0].shape, dtype=args[0].dtype) if value is None else value).numpy()
        return func(*args, **(kwargs or {}))


def _as_numbers(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments of `torch.tensor` with numbers in place of fake tensors, and the type that these make."""
    content, *others = args
    if not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(content)):
        return args, kwargs
    if kwargs.get("dtype") is None:
        with unset_fake_temporarily():
            zeros = tree_map_only(FakeTensor, lambda tensor: torch.zeros((), dtype=tensor.dtype), content)
            kwargs = {**kwargs, "dtype": torch.tensor(zeros).dtype}
    return (tree_map_only(FakeTensor, Tensor.item, content), *others), kwargs


def _is_determined(given: list[Tensor], results: Any) -> bool:
    if given:
        return all(_value(tensor) is not None for tensor in given)
    # A mask or an arange, not the zeros of a weight.
    return bool(results) and not any(result.dtype.is_floating_point for result in results)


def _value(tensor: Tensor) -> Tensor | None:
    return getattr(tensor, "_known_value", None) if isinstance(tensor, FakeTensor) else tensor


def copy_values(source: Tensor, to: Tensor) -> Tensor:
    """Give `to` the values that `source` carries along, and return it."""
    return _with_value(to, _value(source))


def _value_or_ones(tensor: Tensor) -> Tensor:
    value = _value(tensor)
    return torch.ones(tensor.shape, dtype=torch.bool) if value is None else value


def _with_value(tensor: Tensor, value: Tensor | None) -> Tensor:
    if value is not None or hasattr(tensor, "_known_value"):
        tensor._known_value = value  # type: ignore[attr-defined]
    return tensor
