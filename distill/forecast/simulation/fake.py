"""The mode without memory: all tensors made inside are fake, and programs run as if they were real.

Fake tensors are on the CPU, because fake CUDA tensors need a CUDA build of torch. If a CUDA device works otherwise than
a CPU, `distill.forecast.simulation.cuda` takes the device's way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, TypeVar

import bitsandbytes  # noqa: F401  # makes tensors when it is imported, which must be real ones
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.forecast.simulation.cuda import Functions
from distill.forecast.simulation.kernels import DeviceKind
from distill.forecast.simulation.tracker import Tracker
from distill.forecast.simulation.values import Methods, Values
from distill.models.checkpoints import download
from distill.models.packed_attention import masks_alone
from distill.models.shapes import finder, shapes_alone
from distill.system import interrupt

T = TypeVar("T")


@contextmanager
def without_memory(device: DeviceKind, integer: int = 1) -> Iterator[Values]:
    """Make tensors inside with shapes and types but no memory; tensors from outside count as fake ones.

    Checkpoints are not read: a folder with nothing but a `config.json` suffices (`distill.models.shapes`). For
    `integer` see `Values`. Ctrl-C and SIGTERM wait for the next kernel, or the end: raised inside torch's fake mode,
    they leave it broken, and come out as errors of other kinds.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        stack.enter_context(interrupt.held_back())
        stack.enter_context(shapes_alone(finder() or partial(download, files=["config.json"])))
        stack.enter_context(fake)
        values = stack.enter_context(Values(fake, integer))
        stack.enter_context(Methods(fake))
        if device == "cuda":
            stack.enter_context(Functions())
            stack.enter_context(masks_alone())
        yield values


@contextmanager
def tracked(batch: T, device: DeviceKind, integer: int = 1) -> Iterator[tuple[T, Tracker]]:
    """Track what is made inside `without_memory`; the batch is yielded as tensors that carry their values along."""
    tracker = Tracker(device)
    with without_memory(device, integer) as values:
        known = _mapped(batch, values.known)
        with tracker:
            yield known, tracker


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return nested lists, mappings and dataclasses with all their tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    if isinstance(value, dict):
        return {name: _mapped(item, change) for name, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{field.name: _mapped(getattr(value, field.name), change) for field in fields(value)})
    return value
