"""Attention of packed documents on a CPU: document by document, without the scores that a mask would hide.

transformers keeps packed documents apart by a mask `[B, 1, L, L]`, and torch computes all L x L scores under it. Here
each document is attended to by itself, wherever that mask says nothing else: no window, no further pattern, no bias.
Other devices, and all other masks, go the library's own way.

Shapes: B batch, L sequence length, H heads (of keys and values maybe fewer), E size of a head, T = B * L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.models.documents_apart import documents_of

FEWEST_TOKENS = 8
"""Mean length of the documents of a batch from which on they are attended to one by one: each costs several calls."""
_ATTRIBUTE = "_packed_documents"
_positions: ContextVar[Tensor | None] = ContextVar("positions", default=None)
_masks_alone: ContextVar[bool] = ContextVar("masks_alone", default=False)


@dataclass(frozen=True)
class Documents:
    """The documents of a packed batch, noted at the mask that says the same of them."""

    runs: list[tuple[int, int]]
    """Documents in reading order, as neighbours of one length: their number and that length."""
    version: int
    """The mask's version when this was noted: a mask that is written over later says something else."""


@contextmanager
def by_documents(position_ids_BL: Tensor) -> Iterator[None]:
    """Let transformers' models that run inside attend to each document by itself, where their masks allow it."""
    token = _positions.set(position_ids_BL)
    try:
        yield
    finally:
        _positions.reset(token)


@contextmanager
def masks_alone() -> Iterator[None]:
    """Keep the masks inside: for tensors that stand for another device's, and to compare answers in 16 bits."""
    token = _masks_alone.set(True)
    try:
        yield
    finally:
        _masks_alone.reset(token)


def register() -> None:
    """Make transformers' `sdpa` attention look for notes at its masks. Outside of `by_documents` it is as it was."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionMaskInterface.register("sdpa", _mask)
    AttentionInterface.register("sdpa", _attention)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Return transformers' mask, with its documents noted if it keeps just these apart."""
    from transformers.masking_utils import sdpa_mask

    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    positions_BL = _positions.get()
    if mask is None or positions_BL is None or _masks_alone.get():
        return mask
    if positions_BL.device.type != "cpu" or torch.jit.is_tracing():
        return mask
    B, L = positions_BL.shape
    lengths = documents_of(positions_BL)[:, 2]
    window = kwargs.get("local_size")
    if mask.shape != (B, 1, L, L) or len(lengths) * FEWEST_TOKENS > B * L or (window and window < int(lengths.max())):
        return mask
    if torch.equal(mask, document_mask(lengths, B, L)):
        if mask.is_inference():  # torch does not count the writes to such a tensor
            with torch.inference_mode(False):
                mask = mask.clone()
        setattr(mask, _ATTRIBUTE, Documents(runs_of(lengths), mask._version))
    return mask


def runs_of(lengths: Tensor) -> list[tuple[int, int]]:
    """Return the neighbours of one length: their number and that length."""
    begins = torch.cat([torch.zeros(1, dtype=torch.long), (lengths[1:] != lengths[:-1]).nonzero().squeeze(1) + 1])
    counts = torch.cat([begins[1:], torch.tensor([len(lengths)])]) - begins
    return list(zip(counts.tolist(), lengths[begins].tolist(), strict=True))


def document_mask(lengths: Tensor, B: int, L: int) -> Tensor:
    """Return the mask `[B, 1, L, L]` of documents of these lengths: each query sees its document up to itself."""
    ends = lengths.cumsum(0)
    begins_BL = torch.repeat_interleave(ends - lengths, lengths, output_size=B * L).view(B, L) % L
    place_L = torch.arange(L)
    return ((place_L >= begins_BL[:, :, None]) & (place_L <= place_L[:, None]))[:, None]


def _attention(
    module: Any,
    query_BHLE: Tensor,
    key_BHLE: Tensor,
    value_BHLE: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the heads' outputs `[B, L, H, E]` as transformers' `sdpa` does, and None for the scores."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    documents: Documents | None = getattr(attention_mask, _ATTRIBUTE, None)
    given = query_BHLE, key_BHLE, value_BHLE
    if documents is None or not _covers(attention_mask, documents, given, kwargs):
        settings = {"dropout": dropout, "scaling": scaling, **kwargs}
        return sdpa_attention_forward(module, *given, attention_mask, **settings)
    sizes = [count * length for count, length in documents.runs]
    split = [tensor.transpose(1, 2).flatten(0, 1).split(sizes) for tensor in given]  # each [T, H, E]
    outputs = []
    for (count, length), *parts in zip(documents.runs, *split, strict=True):
        query, key, value = (part.unflatten(0, (count, length)).transpose(1, 2) for part in parts)
        output, _ = sdpa_attention_forward(
            module, query, key, value, None, dropout=dropout, scaling=scaling, is_causal=True
        )
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs).unflatten(0, (query_BHLE.shape[0], -1)), None


def _covers(mask: Any, documents: Documents, given: tuple[Tensor, ...], settings: dict[str, Any]) -> bool:
    """Return True if the documents say everything: the mask is as it was, for these tensors, with nothing beside it."""
    beside = (settings.get(name) for name in ("position_bias", "softcap", "cache"))
    B, _, L, _ = mask.shape
    fits = all(tensor.shape[0] == B and tensor.shape[2] == L for tensor in given)
    return fits and mask._version == documents.version and all(value is None for value in beside)
