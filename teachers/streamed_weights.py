"""The weights of a model's layers, one layer at a time in a reused buffer, with the next one read ahead."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from distill.models.streaming import place

ALIGNMENT = 512  # bytes: where CUDA's allocator would put a tensor of its own


@dataclass
class Layer:
    """A layer whose tensors come and go. Without them they are on the meta device."""

    module: nn.Module
    empty: dict[str, Tensor]
    """The layer's weights by their names within it, without memory, in their final types."""

    def __post_init__(self) -> None:
        self._places: dict[str, int] = {}
        self.nbytes = 0
        for name, tensor in self.empty.items():
            self._places[name] = self.nbytes
            self.nbytes += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return the tensors as views of a buffer of bytes."""
        return {
            name: buffer[start : start + prod(tensor.shape) * tensor.itemsize].view(tensor.dtype).view(tensor.shape)
            for start, (name, tensor) in zip(self._places.values(), self.empty.items(), strict=True)
        }

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the layer's tensors by these."""
        for name, tensor in tensors.items():
            place(self.module, name, tensor)


class LayerStream:
    """A stream of layers: one at a time has its weights on the device, in one buffer; the next one is read on the host.

    A background thread reads. On a CUDA device the host's buffer is pinned and copied over without waiting. On the host
    itself the two buffers change places. Layers that have room in the host's memory are read once and stay there.
    """

    _buffer: Tensor | None  # on the device
    _host: Tensor | None
    _ahead: tuple[int, Future[Tensor]] | None  # the layer that is in the host's memory, or on its way there
    _copied: Any  # CUDA event: the host's buffer may be written again

    def __init__(
        self,
        layers: Mapping[int, Layer],
        device: torch.device,
        fill: Callable[[int, dict[str, Tensor]], None] | None,
        host_memory: int = 0,
    ) -> None:
        """Set up `layers` in the order they run; `fill(index, tensors)` reads a layer's weights into its tensors.

        `host_memory`: bytes of layers that stay in the host's memory once they are read. Without `fill` nothing is
        read, and one buffer stands for everything that the device holds, for a forecast.
        """
        self._layers, self._fill = dict(layers), fill
        order = list(self._layers)
        self._after = dict(zip(order, order[1:] + order[:1], strict=True))
        sizes = {index: layer.nbytes for index, layer in self._layers.items()}
        self.nbytes, self.largest = sum(sizes.values()), max(sizes.values(), default=0)
        self._stays: set[int] = set()
        self.kept_bytes = 0
        for index, size in sizes.items():
            if self.kept_bytes + size > host_memory:
                break
            self._stays.add(index)
            self.kept_bytes += size
        self._settle(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="layers")
        self._holds: int | None = None  # the layer that has its weights
        self.reading = 0.0
        """Seconds in which layers were read."""
        if fill is None and order:
            self.hold(order[0])  # so that a count of the weights includes the buffer

    def hold(self, index: int) -> None:
        """Give a layer its weights, which the layer before it loses. Raises the error of reading, if there is one."""
        if self._holds == index:
            return
        self.release()
        if self._fill is None:
            self._buffer = self._buffer if self._buffer is not None else self._empty()
            weights = self._buffer
        else:
            weights = self._over(index, self._read(index))
        self._layers[index].take(self._layers[index].views(weights))
        self._holds = index
        if self._fill is not None:
            following = self._after[index]
            self._ahead = following, self._thread.submit(self._read_now, following)

    def release(self) -> None:
        """Take the weights away from the layer that has them."""
        if self._holds is not None:
            held = self._layers[self._holds]
            self._holds = None
            held.take(held.empty)

    def move(self, device: torch.device) -> None:
        """Continue on another device. The buffers are made when they are needed."""
        self.release()
        if device != self._device:
            if self._ahead is not None:
                self._ahead[1].exception()  # waits for the thread, which writes into the buffer
            self._settle(device)

    def _settle(self, device: torch.device) -> None:
        self._device = device
        self._changes_places = device.type == "cpu"  # the two buffers, which lie in the same memory
        self._buffer = self._host = self._ahead = self._copied = None
        self._kept: dict[int, Tensor] = {}

    def _empty(self, nbytes: int | None = None, on_host: bool = False) -> Tensor:
        pinned = on_host and self._device.type == "cuda"
        device = torch.device("cpu") if on_host else self._device
        return torch.empty(nbytes or self.largest, dtype=torch.uint8, device=device, pin_memory=pinned)

    def _read(self, index: int) -> Tensor:
        """Wait until the host's memory holds this layer, read ahead or now, and return it."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != index:
            ahead = index, self._thread.submit(self._read_now, index)  # queued after a reading that is now useless
        return ahead[1].result()

    def _read_now(self, index: int) -> Tensor:
        if index in self._kept:
            return self._kept[index]
        layer = self._layers[index]
        if index in self._stays:
            own = self._empty(layer.nbytes, on_host=True)
            self._timed(index, layer.views(own))
            self._kept[index] = own
            return own
        if self._copied is not None:
            self._copied.synchronize()
        if self._host is None:
            self._host = self._empty(on_host=True)
        self._timed(index, layer.views(self._host))
        return self._host

    def _timed(self, index: int, tensors: dict[str, Tensor]) -> None:
        assert self._fill is not None
        began = time.perf_counter()
        self._fill(index, tensors)
        self.reading += time.perf_counter() - began

    def _over(self, index: int, host: Tensor) -> Tensor:
        """Bring the weights from the host's memory to the device, and return their place there."""
        if self._changes_places:
            if host is self._host:  # the next layer is read into the buffer of the one before
                self._buffer, self._host = self._host, self._buffer
            return host
        nbytes = self._layers[index].nbytes
        if self._buffer is None:
            self._buffer = self._empty()
        # The device's stream runs this copy after the layer that was computed from the same buffer.
        self._buffer[:nbytes].copy_(host[:nbytes], non_blocking=self._device.type == "cuda")
        if self._device.type == "cuda" and host is self._host:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(self._device))
        return self._buffer
