"""A kernel's work, and a card's time for it: floating-point operations and bytes moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


class Work(NamedTuple):
    """The work of one kernel."""

    dtype: torch.dtype | None
    """Type of a matrix product's inputs. None means that the kernel is no matrix product."""
    flops: int
    """Floating-point operations of matrix products. Other kernels are bound by the bytes they move."""
    bytes: int
    """Bytes read and written."""
    fresh: int = 0
    """Bytes among these that are written to memory just allocated."""


@dataclass(frozen=True)
class Speed:
    """The work that a device really does in a second."""

    flops: Mapping[torch.dtype, float]
    """Rate of matrix products, by their type. A missing type is as slow as the slowest."""
    bytes: float
    """Bytes read and written by kernels that wait for nothing else."""
    launch: float = 0.0
    """Seconds that the program takes from one kernel to the next."""
    in_turn: bool = False
    """True if the program waits for its kernels, as on a processor; otherwise it runs ahead of them."""
    fresh: float = 1.0
    """Ratio of the times of a byte written to memory just allocated and another byte."""

    def seconds(self, work: Counter[Work]) -> float:
        """Return the time: for each kernel the longer of computing and moving, and its launch, after or meanwhile."""
        total, slowest = 0.0, min(self.flops.values())
        for (dtype, flops, moved, fresh), count in work.items():
            computing = 0.0 if dtype is None else flops / self.flops.get(dtype, slowest)
            running = max(computing, (moved + (self.fresh - 1) * fresh) / self.bytes)
            total += count * (running + self.launch if self.in_turn else max(running, self.launch))
        return total


def tensors_in(*groups: Iterable[Any]) -> list[Tensor]:
    """Return all tensors among a kernel's arguments or results: alone, in lists and in tuples."""
    found: list[Tensor] = []
    for group in groups:
        for value in group:
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, (list, tuple)):
                found += tensors_in(value)
    return found


def work_of(func: Any, args: Any, kwargs: Any, made: Any) -> Work | None:
    """Return a kernel's work, or None for a view, which does nothing."""
    if func.is_view or func in _FREE:
        return None
    given, results = tensors_in(args, kwargs.values()), tensors_in([made])
    if func.namespace == "bitsandbytes" and not results:  # a fused update: it writes all but the gradient, given first
        results = given[1:]
    written = sum(_bytes(tensor) for tensor in results)
    # These kernels pick rows out of their arguments, and only these rows are read.
    read = written if func in _GATHERS else sum(_bytes(tensor) for tensor in given)
    moved = _PASSES.get(func._overloadpacket, 1) * read + written
    flops = _flops(func, args, kwargs, made)
    fresh = 0 if func._schema.is_mutable else written
    return Work(given[0].dtype if flops else None, flops, moved, fresh)


def _flops(func: Any, args: Any, kwargs: Any, made: Any) -> int:
    packet = func._overloadpacket
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
    if packet.__name__ == "gemm_4bit":
        return 2 * args[0].numel() * args[2][0]
    if packet is aten._int_mm:
        return 2 * args[0].numel() * args[1].shape[1]
    if packet is aten._grouped_mm:  # each row, or column, is in one of the groups
        return 2 * args[0].numel() * args[1].shape[-1] // (args[0].shape[0] if args[0].dim() > args[1].dim() else 1)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=made))
    return 0


def _bytes(tensor: Tensor) -> int:
    """Return the bytes that are really there, because an expanded tensor repeats itself."""
    return min(prod(tensor.shape) * tensor.element_size(), tensor.untyped_storage().nbytes())


_FREE = {
    *(aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default),
    *(aten.new_empty_strided.default, aten.detach.default, aten._unsafe_view.default, aten._local_scalar_dense.default),
}
_PASSES = {aten.topk: 8}
"""Number of times that a kernel reads its arguments: a card selects digit by digit, a processor sorts pairs."""
_GATHERS = {aten.embedding.default, aten.index.Tensor, aten.gather.default, aten.index_select.default}
