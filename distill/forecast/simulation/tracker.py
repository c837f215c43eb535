"""A tracker of a program's allocations and work, kernel by kernel, on real tensors and on fake ones alike.

A storage counts from the kernel that makes it until nothing refers to it any more. Views share their storage.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distill.forecast.simulation.kernels import CUBLAS_BYTES, DeviceKind, moved_in_workspace, workspace
from distill.forecast.simulation.values import has_own_dispatch
from distill.forecast.simulation.work import Work, tensors_in, work_of

Kind = Literal[
    "weights",
    "quantized weights",
    "gradients",
    "optimizer states",
    "activations",
    "head and loss",
    "temporaries",
    "buffers and batch",
]
KINDS: tuple[Kind, ...] = Kind.__args__  # type: ignore[attr-defined]
GRANULES = {"cpu": 64, "cuda": 512}
"""Bytes whose multiple each allocation takes."""


@dataclass(eq=False, slots=True)
class Storage:
    """One storage, dead or alive. Its kind may be learned long after its birth, so it is asked for at the end."""

    bytes: int
    kind: Kind | None
    in_loss: bool
    is_kept: bool

    def final_kind(self) -> Kind:
        if self.kind is not None:
            return self.kind
        if self.in_loss:
            return "head and loss"
        return "activations" if self.is_kept else "temporaries"


@dataclass(frozen=True)
class Peak:
    """The moment at which most bytes existed."""

    bytes: int
    parts: dict[Kind, int]
    """Bytes of each kind at that moment; they sum to `bytes`."""


class Tracker(TorchDispatchMode):
    """A mode that records every storage that a kernel makes, and every kernel's work.

    Storages that existed before are recorded when `tag` names them. Those on the `host` are not counted.
    """

    def __init__(self, device: DeviceKind) -> None:
        super().__init__()
        self.device: DeviceKind = device
        self.current = 0
        """Bytes that exist now."""
        self.work: Counter[Work] = Counter()
        """Work of every kernel since it was last cleared."""
        self._events: list[tuple[int, Storage]] = []
        self._live: dict[int, tuple[weakref.ref[Any], Storage]] = {}
        self._held: dict[Storage, None] = {}
        self._in_loss = False
        self._in_backward = False
        self._elsewhere = False
        self._late: tuple[int, Storage] | None = None
        if device == "cuda":
            self.hold([Storage(self._rounded(CUBLAS_BYTES), "buffers and batch", False, False)])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(has_own_dispatch(kind) for kind in types):
            return NotImplemented  # a tensor made of tensors calls again with those
        if func is torch.ops.prim.device.default:  # fake tensors get this call more often than all others together
            return args[0].fake_device
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        self._notice_backward()
        self._flush()
        pinned = bool(kwargs.get("pin_memory"))
        if pinned:  # memory of the host; fake tensors cannot be it without CUDA
            kwargs = {**kwargs, "pin_memory": False}
        made = func(*args, **kwargs)
        on_host = self.device == "cuda" and self._are_on_host(tensors_in(args, kwargs.values()))
        with self.host() if pinned or on_host else nullcontext():
            for tensor in tensors_in([made]):
                self._note(tensor, None)
        if on_host:  # a kernel of the processor
            return made
        is_sum = func is torch.ops.aten.add.Tensor and self._in_backward and not torch.is_grad_enabled()
        if is_sum and made.numel() and not self._elsewhere:
            # Autograd sums gradients in place, but not for fake tensors and not under modes such as this one. So the
            # sum counts from the death of its arguments, or from the next kernel on.
            self._late = self._events.pop()
        extra = self._rounded(workspace(func, args, kwargs, made, self.device))
        if extra and not self._elsewhere:
            storage = Storage(extra, None, self._in_loss, False)
            self._events += [(extra, storage), (-extra, storage)]
        work = work_of(func, args, kwargs, made)
        if is_sum and work is not None:
            work = work._replace(fresh=0)
        self._count(work, moved_in_workspace(func, args, extra, self.device))
        return made

    def _are_on_host(self, tensors: list[Tensor]) -> bool:
        """Tell whether a kernel's arguments are copies in the host's memory, or came from there, as numpy's do."""
        storages = [self.storage_of(tensor) for tensor in tensors if tensor.numel()]
        return bool(storages) and all(storage is None or not storage.bytes for storage in storages)

    def _count(self, work: Work | None, moved: int) -> None:
        """Count a kernel's work. `moved` bytes go to its workspace, which a matrix product fills before it begins."""
        if work is not None and work.flops:
            self.work[work] += 1
            work = Work(None, 0, 0) if moved else None
        if work is not None:
            self.work[work._replace(bytes=work.bytes + moved, fresh=work.fresh + moved // 2)] += 1

    def tag(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Set the kind of tensors. Storages unknown so far are counted from now on."""
        for tensor in tensors:
            self._note(tensor, kind)

    def hold(self, storages: Iterable[Storage]) -> None:
        """Count bytes that no tensor here has."""
        for storage in storages:
            self._held[storage] = None
            self.current += storage.bytes
            self._events.append((storage.bytes, storage))

    def release(self, storages: Iterable[Storage]) -> None:
        """Stop counting what `hold` began to count."""
        for storage in storages:
            del self._held[storage]
            self.current -= storage.bytes
            self._events.append((-storage.bytes, storage))

    def living(self) -> list[Storage]:
        """Return the storages that exist now, in the order in which they were made."""
        return [storage for _, storage in self._live.values()]

    def storage_of(self, tensor: Tensor) -> Storage | None:
        """Return a tensor's storage, or None if it is not recorded."""
        found = self._live.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[1]

    def peak(self) -> Peak:
        """Return the peak since the tracker was made, or since `forget`."""
        self._flush()
        now = most = 0
        at = -1
        for number, (change, _) in enumerate(self._events):
            now += change
            if now > most:
                most, at = now, number
        parts = dict.fromkeys(KINDS, 0)
        for change, storage in self._events[: at + 1]:
            parts[storage.final_kind()] += change
        return Peak(most, parts)

    def forget(self) -> None:
        """Forget dead storages: the peak is then that of the living ones and the later ones."""
        living = [*self._held, *(storage for _, storage in self._live.values() if storage.bytes)]
        self._events = [(storage.bytes, storage) for storage in living]
        self.work.clear()

    @contextmanager
    def loss(self) -> Iterator[None]:
        """Count storages made inside as head and loss."""
        before, self._in_loss = self._in_loss, True
        try:
            yield
        finally:
            self._in_loss = before

    @contextmanager
    def host(self) -> Iterator[None]:
        """Count storages made inside as another memory than the device's."""
        before, self._elsewhere = self._elsewhere, True
        try:
            yield
        finally:
            self._elsewhere = before

    def _note(self, tensor: Tensor, kind: Kind | None) -> None:
        if tensor.is_meta:  # a streamed layer that waits on the disk
            return
        owner = tensor.untyped_storage()
        key = owner._cdata
        if key in self._live:
            if kind is not None:
                self._live[key][1].kind = kind
            return
        # Inside backward only recomputed tensors (activation checkpointing) want gradients.
        recomputed = self._in_backward and torch.is_grad_enabled()
        size = 0 if self._elsewhere else self._rounded(owner.nbytes())
        storage = Storage(size, kind, self._in_loss, recomputed)
        self._live[key] = weakref.ref(owner, lambda _: self._died(key)), storage
        self.current += size
        if size:
            self._events.append((size, storage))

    def _died(self, key: int) -> None:
        _, storage = self._live.pop(key)
        self.current -= storage.bytes
        if storage.bytes:
            self._events.append((-storage.bytes, storage))

    def _notice_backward(self) -> None:
        """Mark the storages that exist when a backward pass begins as kept for it."""
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and not self._in_backward:
            for _, storage in self._live.values():
                storage.is_kept = True
        self._in_backward = in_backward

    def _flush(self) -> None:
        if self._late is not None:
            self._events.append(self._late)
            self._late = None

    def _rounded(self, size: int) -> int:
        granule = GRANULES[self.device]
        return -(-size // granule) * granule
