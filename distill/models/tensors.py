"""A checkpoint's tensors by name, each read from disk on request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from distill.errors import UserError
from distill.models.checkpoints import Checkpoint, refuse_adapter, text_renaming, weight_files
from distill.models.huggingface import load_pretrained
from distill.models.tensor_files import TensorFile


class Tensors(Mapping[str, Tensor]):
    """A checkpoint's tensors by their Hugging Face names. Each is read from disk on request.

    A multimodal checkpoint has those of its text part alone, under the names of that family.

    transformers dequantises a GGUF file into memory once, at the first request, because its tensors have other names.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._places: dict[str, tuple[TensorFile, str]] = {}
        self._loaded: dict[str, Tensor] | None = None
        if checkpoint.gguf_file is not None:
            return
        refuse_adapter(checkpoint)
        if checkpoint.is_copy:
            raise UserError(f"{checkpoint.name} is a quantised copy, for teachers alone: name the checkpoint itself")
        for file in weight_files(checkpoint):
            opened = TensorFile(file)
            self._places.update({name: (opened, name) for name in opened.names()})
        if prefixes := text_renaming(checkpoint, self._places):
            stored, self._places = self._places, {}
            for name, place in stored.items():
                for before, after in prefixes.items():
                    if name.startswith(before):
                        self._places[after + name.removeprefix(before)] = place

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._places if self._checkpoint.gguf_file is None else self._dequantised())

    def read(self, name: str) -> Tensor:
        """Return one tensor, in the dtype in which it is stored (GGUF: float32)."""
        if self._checkpoint.gguf_file is not None:
            return self._dequantised()[name]
        file, stored = self._places[name]
        return file.read(stored)

    def _dequantised(self) -> dict[str, Tensor]:
        if self._loaded is None:
            self._loaded = load_pretrained(self._checkpoint, torch.float32).state_dict()
        return self._loaded

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())


def tensors(checkpoint: Checkpoint) -> Tensors:
    """Open a checkpoint's tensors for lazy reading. Raises UserError for pickle and adapters."""
    return Tensors(checkpoint)
