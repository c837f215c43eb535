"""The place where an experiment's objects are made: a device of this machine, or an imagined card, without memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from distill.experiment.configuration import Experiment
from distill.models import devices
from distill.models.shapes import Find, shapes_alone


@dataclass(frozen=True)
class Place:
    """A device of this machine, or a card that is imagined."""

    device: torch.device
    """Device of the objects. It is a CPU if they have no memory."""
    device_type: str
    """Kind of device for which optimisers and settings are chosen: cuda, cpu or mps."""
    imagined_dtype: str | None = None
    """Type for `auto` on an imagined card. None means that a device of this machine is asked."""
    find: Find | None = None
    """Function that finds the configuration of a hub name. None means that objects have memory."""

    @property
    def has_memory(self) -> bool:
        return self.find is None

    @classmethod
    def of(cls, experiment: Experiment) -> Place:
        """Return the device that the experiment runs on here. Raises UserError if it has none."""
        device = devices.pick_device(experiment.train.accelerator)
        return cls(device, device.type)

    @classmethod
    def host(cls) -> Place:
        """Return the processor of this machine."""
        return cls(torch.device("cpu"), "cpu")

    @classmethod
    def without_memory(cls, is_cuda: bool, has_bf16: bool, find: Find) -> Place:
        """Return a card with these abilities. Its objects are made among fake tensors, which the caller provides."""
        kind = "cuda" if is_cuda else "cpu"
        return cls(torch.device("cpu"), kind, devices.dtype_of_card(is_cuda, has_bf16), find)

    def compute_dtype(self, name: str) -> str:
        """Return the name of a type, `auto` replaced by the best one here."""
        if name == "auto" and self.imagined_dtype is not None:
            return self.imagined_dtype
        return devices.compute_dtype(name, self.device)

    def making(self) -> AbstractContextManager[None]:
        """Load configurations or whole checkpoints inside, as this place needs."""
        return nullcontext() if self.find is None else shapes_alone(self.find)
