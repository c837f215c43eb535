"""Safetensors files opened once and read a tensor at a time, into memory of the caller's or new memory.

A mapped file, as the safetensors library reads it, would count in this process's memory for as long as it is open.
"""

from __future__ import annotations

import json
import os
import threading
import weakref
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from distill.errors import UserError

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "BOOL": torch.bool,
}
_PIECE = 2**26
"""Bytes that are read at a time."""


class TensorFile:
    """One safetensors file, which somebody has checked (`safety.check_weights`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._descriptor)
        self._lock = threading.Lock()  # where the system cannot read at a place
        length = int.from_bytes(self._bytes(0, 8), "little")
        header = json.loads(self._bytes(8, length))
        header.pop("__metadata__", None)
        self._start, self._header = 8 + length, header
        self.bytes_read = 0

    def names(self) -> list[str]:
        return list(self._header)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._header[name]["shape"])

    def type(self, name: str) -> str:
        """Return the type in which a tensor is stored, as safetensors calls it (`F32`, `I8`)."""
        return str(self._header[name]["dtype"])

    def nbytes(self, name: str) -> int:
        begin, end = self._header[name]["data_offsets"]
        return int(end - begin)

    def read(self, name: str) -> Tensor:
        """Return a tensor in its stored type, in memory of its own."""
        entry = self._header[name]
        if entry["dtype"] not in TYPES:
            raise UserError(f"{self.path}: {name} is of type {entry['dtype']}, which cannot be read here")
        tensor = torch.empty(entry["shape"], dtype=TYPES[entry["dtype"]])
        self.read_into(name, tensor)
        return tensor

    def read_into(self, name: str, tensor: Tensor) -> None:
        """Read into a contiguous CPU tensor of the stored type and shape. Raises UserError if it is another."""
        entry = self._header[name]
        if self.shape(name) != tuple(tensor.shape) or TYPES.get(entry["dtype"]) != tensor.dtype:
            raise UserError(
                f"{self.path}: {name} is {entry['dtype']} {list(self.shape(name))}, expected {tensor.dtype} "
                f"{list(tensor.shape)}: make the file anew"
            )
        begin, end = (self._start + offset for offset in entry["data_offsets"])
        if prod(tensor.shape) == 0:
            return
        target = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        for place in range(begin, end, _PIECE):
            piece = target[place - begin : min(place + _PIECE, end) - begin]
            self._into(place, piece)
        self.bytes_read += end - begin

    def _bytes(self, at: int, count: int) -> bytes:
        found = bytearray(count)
        self._into(at, memoryview(found))
        return bytes(found)

    def _into(self, at: int, target: memoryview) -> None:
        done = 0
        while done < len(target):
            if hasattr(os, "preadv"):
                count = os.preadv(self._descriptor, [target[done:]], at + done)
            else:  # Windows
                with self._lock:
                    os.lseek(self._descriptor, at + done, os.SEEK_SET)
                    found = os.read(self._descriptor, len(target) - done)
                target[done : done + len(found)] = found
                count = len(found)
            if count == 0:
                raise UserError(f"{self.path} is cut off: fetch it anew")
            done += count
