"""A trial of a model's body and head on a few tokens: one message for what breaks their contract, and where.

Shapes: B batch, L sequence length, V vocabulary, D hidden size.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.models.language_model import Head, check_rows, hidden_states
from distill.system.blame import blame, failed
from distill.system.memory import is_out_of_memory
from distill.system.progress import say


def check_members(model: Any, name: str) -> None:
    """Raise UserError when `model` is not a `torch.nn.Module` with a `body` and a `head`."""
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise UserError(f"{name}: made a {kind}, not a torch.nn.Module")
    if "_modules" not in vars(model):
        raise UserError(f"{name}: {kind} does not call super().__init__() in its constructor")
    try:
        body = getattr(model, "body", None)
    except BaseException as error:  # a property's code
        if not failed(error):
            raise
        raise UserError(f"{name}: its body failed: {blame(error)}") from error
    if not callable(body):
        raise UserError(f"{name}: {kind} has no method 'body(input_ids_BL, position_ids_BL)'")
    checked_head(model, name, 1)


def not_finite(dtype: torch.dtype) -> str:
    """Return the message for outputs that are infinite or NaN."""
    return (
        f"its outputs are not finite: weights that are not, or sums too large for {str(dtype).removeprefix('torch.')}; "
        "give other weights, or compute in a wider type"
    )


def try_model(
    model: nn.Module, name: str, ids_BL: Tensor, positions_BL: Tensor, vocab_size: int, *, trains: bool = False
) -> Tensor:
    """Return the logits `[B, L, V]` of a pass in evaluation mode, over the first `vocab_size` rows of the head.

    Raises UserError for what no training or measurement could go on with: an exception in the model's code, and hidden
    states or a head that break the contract. With `trains`, also for weights that would not learn.
    Random draws of the model here leave no trace.
    """
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        cards = [ids_BL.device] if ids_BL.device.type == "cuda" else []
        with torch.random.fork_rng(cards), torch.set_grad_enabled(trains):
            if trains:  # a teacher may read its layers from disk, one at a time
                _check_memory(model, name)
            hidden_BLD = _hidden_states(model, name, ids_BL, positions_BL)
            head = checked_head(model, name, vocab_size)
            _check_head_stays(head, checked_head(model, name, vocab_size), name)
            _check_size(hidden_BLD, head, name)
            if trains:
                _check_gradients(model, name, hidden_BLD, head)
        with torch.no_grad():
            return head.with_rows(vocab_size)(hidden_BLD)
    finally:
        for module, mode in modes:
            module.training = mode


def in_type(make: Callable[[torch.dtype], Any], dtype: torch.dtype, name: str) -> Any:
    """Return the model that `make` makes in a type, or in float32 if its own code fails in 16 bits, which is said.

    Code that mixes types runs in a training, where autocast mends them, and not with weights of 16 bits.
    """
    model = make(dtype)
    if dtype == torch.float32 or (reason := _failure(model)) is None:
        return model
    _say_once(f"{name}: computes in float32, for its code fails in {str(dtype).removeprefix('torch.')}: {reason}")
    return make(torch.float32)


@functools.lru_cache(maxsize=64)
def _say_once(line: str) -> None:
    say(line)


def _failure(model: Any) -> str | None:
    """Return the error of a model's code on a few tokens, or None."""
    ids_BL = torch.zeros(1, 4, dtype=torch.long, device=model.head.weight_VD.device)
    try:
        with torch.no_grad():
            model.head(hidden_states(model, ids_BL, torch.arange(4, device=ids_BL.device)[None]))
    except BaseException as error:
        if not failed(error) or is_out_of_memory(error):
            raise
        return blame(error, model.body)
    return None


def _hidden_states(model: Any, name: str, ids_BL: Tensor, positions_BL: Tensor) -> Tensor:
    """Return the hidden states; raise UserError when they are not of the right kind and shape."""
    try:
        output = model.body(ids_BL.clone(), positions_BL.clone())
    except (UserError, torch.OutOfMemoryError):
        raise
    except BaseException as error:  # a stranger's code may fail in any way
        if not failed(error):
            raise
        raise UserError(f"{name}: its body failed: {blame(error, model.body)}") from error
    wanted = "hidden states [B, L, D], or a tuple (hidden states, auxiliary loss)"
    if isinstance(output, tuple):
        if len(output) != 2 or not isinstance(output[0], Tensor) or not _is_scalar(output[1]):
            kinds = ", ".join(_kind(each) for each in output)
            raise UserError(
                f"{name}: its body returned a tuple ({kinds}): return {wanted}, a tensor without dimensions"
            )
        if output[1] is not None and not bool(output[1].isfinite()):
            raise UserError(
                f"{name}: its body returned the auxiliary loss {float(output[1].detach())}: it must be finite"
            )
        output = output[0]
    if not isinstance(output, Tensor):
        if inspect.iscoroutine(output):
            output.close()  # or Python warns that nobody waited for it
        raise UserError(f"{name}: its body returned {_kind(output)}: return {wanted}")
    if not output.is_floating_point():
        raise UserError(f"{name}: its body returned a tensor of {_type(output)}: hidden states are of a float type")
    if not _has_values(output):
        raise UserError(f"{name}: its body returned {_kind(output)}: hidden states are dense, and have values")
    if output.dim() != 3 or output.shape[:2] != ids_BL.shape:
        batch, length = ids_BL.shape
        raise UserError(
            f"{name}: its body returned the shape {list(output.shape)} for token ids of shape {[batch, length]}: "
            f"hidden states are [B, L, D], here [{batch}, {length}, D]"
        )
    return output


def checked_head(model: Any, name: str, vocab_size: int) -> Head:
    """Return the head of a model; raise UserError when it is none, or is not one for `vocab_size` tokens."""
    if not hasattr(type(model), "head") and not hasattr(model, "head"):
        raise UserError(f"{name}: {type(model).__name__} has no 'head' (a distill.models.language_model.Head)")
    try:
        head = model.head
    except UserError:
        raise
    except BaseException as error:  # a property's code
        if not failed(error):
            raise
        getter = getattr(getattr(type(model), "head", None), "fget", None)
        raise UserError(f"{name}: its head failed: {blame(error, getter)}") from error
    if not isinstance(head, Head):
        raise UserError(
            f"{name}: 'head' is {_kind(head)}, not a distill.models.language_model.Head "
            "(make it a property: return Head(self.lm_head.weight))"
        )
    weight, bias = head.weight_VD, head.bias_V
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise UserError(f"{name}: its head's weight is {_kind(weight)}: give a float tensor [tokens, hidden size]")
    if weight.layout != torch.strided:
        raise UserError(f"{name}: its head's weight is {_kind(weight)}: give a dense one")
    rows = len(weight)
    try:
        check_rows(rows, vocab_size)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    if bias is not None and (not isinstance(bias, Tensor) or bias.shape != (rows,) or not bias.is_floating_point()):
        raise UserError(f"{name}: its head's bias is {_kind(bias)}: give a float tensor [{rows}], or None")
    if not _is_number(head.scale) or head.scale == 0:
        raise UserError(f"{name}: its head's scale is {_shown(head.scale)}: give a number other than 0")
    if head.soft_cap is not None and not (_is_number(head.soft_cap) and head.soft_cap > 0):
        raise UserError(f"{name}: its head's soft_cap is {_shown(head.soft_cap)}: give a number above 0, or None")
    return head


def _check_memory(model: nn.Module, name: str) -> None:
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise UserError(f"{name}: {path} is {_kind(tensor)}: give it values in the constructor")


def _check_head_stays(head: Head, again: Head, name: str) -> None:
    """Raise UserError for a head without values, or one that is another when it is asked for again."""
    if not _has_values(head.weight_VD):
        raise UserError(f"{name}: its head's weight is {_kind(head.weight_VD)}: give it values")
    pairs = [(head.weight_VD, again.weight_VD), (head.bias_V, again.bias_V)]
    for one, other in pairs:
        if one is not other and (one is None or other is None or not torch.equal(one, other)):
            raise UserError(f"{name}: its head is another one each time it is asked for (random, or a counter?)")


def _check_size(hidden_BLD: Tensor, head: Head, name: str) -> None:
    size, (rows, wanted) = hidden_BLD.shape[-1], head.weight_VD.shape
    if size == wanted:
        return
    hint = "; these look like logits: return what goes into the head" if size == rows else ""
    raise UserError(
        f"{name}: its body makes hidden states of size {size}, its head's weight is [{rows}, {wanted}]{hint}"
    )


def _check_gradients(model: nn.Module, name: str, hidden_BLD: Tensor, head: Head) -> None:
    """Raise UserError for weights that would not learn though they seem to, or that no one would save."""
    known = {id(parameter): path for path, parameter in model.named_parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise UserError(f"{name}: it has no parameter that requires a gradient: nothing would learn")
    of_head = {id(head.weight_VD), id(head.bias_V)}
    if not hidden_BLD.requires_grad and any(id(parameter) not in of_head for parameter in trained):
        raise UserError(f"{name}: no gradient reaches its body (torch.no_grad, detach or .data there?)")
    used = [*_leaves(hidden_BLD), *_leaves(head.weight_VD)]
    if strange := [leaf for leaf in used if id(leaf) not in known]:
        raise UserError(
            f"{name}: it computes with a weight {list(strange[0].shape)} that is none of its parameters and would be "
            "neither trained nor saved: keep layers in an nn.ModuleList, weights in an nn.Parameter"
        )
    if head.weight_VD.requires_grad:
        return
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    place = head.weight_VD.untyped_storage().data_ptr()
    owners = [path for path, tensor in tensors.items() if tensor.untyped_storage().data_ptr() == place]
    if not owners:
        raise UserError(f"{name}: its head's weight is none of its parameters: it would be neither trained nor saved")
    if any(tensors[path].requires_grad for path in owners):
        raise UserError(f"{name}: no gradient reaches its head through {owners[0]} (detach or .data there?)")


def _leaves(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that a computed one gets its gradient from in the end."""
    if tensor.grad_fn is None:
        if tensor.requires_grad:
            yield tensor
        return
    waiting, seen = [tensor.grad_fn], set()
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [following for following, _ in node.next_functions]


def _is_scalar(value: Any) -> bool:
    return value is None or (isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _has_values(tensor: Tensor) -> bool:
    """Tell whether a tensor is dense, and more than a shape."""
    return tensor.layout == torch.strided and not tensor.is_meta


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, (int, float, str)) else _kind(value)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        without = "" if _has_values(value) else " without memory" if value.is_meta else " that is sparse"
        return f"a tensor {list(value.shape)} of {_type(value)}{without}"
    return "None" if value is None else f"a {type(value).__name__}"


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
