"""The result of a simulation, and the kinds of a model's tensors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from distill.forecast.simulation.tracker import Kind, Tracker
from distill.forecast.simulation.work import Work
from distill.models.packed import PackedWeight


@dataclass(frozen=True)
class Simulation:
    """Memory and work of a training step, or of a batch of the teacher."""

    peak_bytes: int
    """Largest number of bytes on the device at one time, including the model."""
    parts: dict[Kind, int]
    """Bytes of each kind at the peak."""
    work: Counter[Work]
    """Work of all kernels. `Speed.seconds(work)` is its time."""
    update: Counter[Work] = field(default_factory=Counter)
    """Share of `work` that is the optimiser's. A step has it once, for any number of passes."""

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products."""
        return sum(work.flops * count for work, count in self.work.items())

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written by all kernels."""
        return sum(work.bytes * count for work, count in self.work.items())


def result_of(tracker: Tracker, work: Counter[Work] | None = None, update: Counter[Work] | None = None) -> Simulation:
    """Return what a tracker saw; `work` is by default all of it."""
    peak = tracker.peak()
    return Simulation(peak.bytes, peak.parts, Counter(tracker.work if work is None else work), update or Counter())


def tag_model(tracker: Tracker, module: nn.Module) -> None:
    """Tell the tracker a model's weights and buffers."""
    tracker.tag(module.buffers(), "buffers and batch")
    for part in module.modules():
        if isinstance(part, PackedWeight):
            tracker.tag(part.buffers(), "quantized weights")
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None or not parameter.is_floating_point():
            scales = all_tensors([state, getattr(parameter, "SCB", None)])
            tracker.tag([parameter, *scales], "quantized weights")
        else:
            tracker.tag([parameter], "weights")


def all_tensors(value: Any) -> list[Tensor]:
    """Return all tensors in nested dataclasses, mappings, sequences and quantisation states."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        return [tensor for field in fields(value) for tensor in all_tensors(getattr(value, field.name))]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in all_tensors(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in all_tensors(item)]
    return all_tensors(vars(value)) if type(value).__name__ == "QuantState" else []
