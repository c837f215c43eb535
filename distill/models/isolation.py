"""A probe for leaks: a position that sees the future, another row or another document; answers that are not repeated.

Shapes: B batch, L sequence length, D hidden size.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill.models.language_model import LanguageModel, hidden_states
from distill.models.packed_attention import masks_alone
from distill.models.perturbation import perturbed
from distill.system.seeds import seed_all

LENGTH = 12
"""Tokens of a row when nothing else is asked for."""
WIDE = (torch.float32, torch.float64)
"""Types in which rounding is far smaller than the effect of a leak."""


class Fault(Enum):
    """A way to break the contract of `body`; the value says it to the user, behind the model's name."""

    INPUT = (
        "its body changes the token ids or positions that it is given: let it work on a copy "
        "(input_ids = input_ids.clone())"
    )
    ANSWERS = (
        "it answers the same tokens otherwise the second time, in evaluation mode: random numbers (routing, or dropout "
        "that self.training does not switch off), or a state kept between calls"
    )
    ROWS = (
        "rows of a batch see one another in this model: a sample's hidden states change with the samples beside it "
        "(a mean or norm over the batch, such as BatchNorm?)"
    )
    FUTURE = (
        "a position sees the tokens behind it in this model, and so the one that it is to predict (attention without "
        "a causal mask, a convolution padded on both sides, a shift the wrong way, a norm over positions?)"
    )
    DOCUMENTS = (
        "packed documents see one another in this model (attention without a mask made of position_ids, or a state "
        "that runs across their restarts at 0): cache and train with --corpus.pack false"
    )


@dataclass(frozen=True)
class Rows:
    """Rows of token ids, twice: where `kept_BL` holds, a sound model's hidden states are the same both times.

    Each of the first four rows has a cut, from which on its tokens are others the second time. When documents are
    packed, the last but one row holds a first document, which changes, and a second one; the last row holds that second
    document alone, with other tokens behind it. The last row is left out the second time, for a batch of another size
    must not change the others either.
    """

    ids_BL: Tensor
    other_BL: Tensor
    """Another token everywhere."""
    positions_BL: Tensor
    kept_BL: Tensor
    first_document: int
    """Tokens of the first document; 0: no documents are packed."""

    @classmethod
    def make(cls, vocab_size: int, length: int, pack: bool, device: torch.device | str) -> Rows:
        """Return rows of `length` tokens, at least 2."""
        place_L = torch.arange(length)
        cuts = [max(cut, 1) for cut in (1, length // 4, length // 2, length - length // 4)]
        first = max(length * 7 // 12, 1) if pack else 0
        second = length - first
        random_numbers = torch.Generator().manual_seed(0)
        shape = (6 if pack else 5, length)
        ids_BL = torch.randint(0, vocab_size, shape, generator=random_numbers)
        kept_BL = place_L < torch.tensor([*cuts, *([0] if pack else []), second])[:, None]
        positions_BL = place_L.repeat(len(ids_BL), 1)
        if pack:
            ids_BL[-1, :second] = ids_BL[-2, first:]
            kept_BL[-2, first:] = True
            positions_BL[-2, first:] -= first
        other_BL = (ids_BL + torch.randint(1, max(vocab_size, 2), shape, generator=random_numbers)) % vocab_size
        return cls(ids_BL.to(device), other_BL.to(device), positions_BL.to(device), kept_BL.to(device), first)


def find_fault(
    model: LanguageModel,
    vocab_size: int,
    device: torch.device | str,
    *,
    pack: bool = True,
    length: int = LENGTH,
    perturb: bool = True,
) -> Fault | None:
    """Return a promise of the contract that `model` breaks; None when it keeps them all.

    It is measured in evaluation mode, and for a model in training mode in that mode too, with the same random numbers
    in each pass (BatchNorm looks at its batch in training mode alone). A sound model costs two passes a mode.
    Weights, buffers, modes and random states are afterwards as they were.

    Args:
        pack: documents share a row, and must not see one another.
        length: tokens of a row.
        perturb: measure with noise on the weights (where that makes hidden states that are not finite: without).
    """
    rows = Rows.make(vocab_size, length, pack, device)
    passes = _Passes(model, rows.positions_BL)
    with passes.undisturbed():
        if perturb and isinstance(model, nn.Module):
            with perturbed(model):
                fault = _find(passes, rows)
            if passes.are_finite:
                return fault
        return _find(passes, rows)


def isolates_documents(model: LanguageModel, vocab_size: int, device: torch.device | str) -> bool:
    """Return True when documents packed in one row stay apart, in a model without other faults.

    State-space families return False: their state runs on from document to document.
    """
    return find_fault(model, vocab_size, device) is None


def _find(passes: _Passes, rows: Rows) -> Fault | None:
    for in_training in (False, True) if passes.trains else (False,):
        passes.in_training = in_training
        if (fault := _compare(passes, rows)) is not None:
            return fault
    return None


def _compare(passes: _Passes, rows: Rows) -> Fault | None:
    """Return what two passes give away; further passes only find its name."""
    once_BLD = passes.run(rows.ids_BL)
    # In training mode dropout draws otherwise for a smaller batch.
    stay = len(rows.ids_BL) - (0 if passes.in_training else 1)
    changed_BL = torch.where(rows.kept_BL, rows.ids_BL, rows.other_BL)
    moved_BL = torch.zeros_like(rows.kept_BL)
    moved_BL[:stay] = passes.differ(once_BLD[:stay], passes.run(changed_BL[:stay])) & rows.kept_BL[:stay]
    if passes.changed_input:
        return Fault.INPUT
    if rows.first_document and not passes.in_training:  # in training dropout draws otherwise for each row
        of_packed_LD = once_BLD[-2, rows.first_document :]
        moved_BL[-2, rows.first_document :] |= passes.differ(of_packed_LD, once_BLD[-1, : len(of_packed_LD)])
    if not moved_BL.any():
        return None
    if passes.differ(once_BLD, passes.run(rows.ids_BL)).any():
        # In training mode a counter, or Python's own random numbers, may do this: nothing can be said then.
        return None if passes.in_training else Fault.ANSWERS
    if _rows_meet(passes, rows, once_BLD):
        return Fault.ROWS
    if rows.first_document:
        moved_BL[-2] = False
    if not moved_BL.any():
        return Fault.DOCUMENTS
    # One row alone changes behind its cut: what still moves before the cut has seen it.
    row = int(moved_BL.any(dim=1).nonzero()[0])
    changed_BL = rows.ids_BL.clone()
    changed_BL[row] = torch.where(rows.kept_BL[row], rows.ids_BL[row], rows.other_BL[row])
    has_seen_BL = passes.differ(once_BLD, passes.run(changed_BL)) & rows.kept_BL
    return Fault.FUTURE if has_seen_BL[row].any() else Fault.ROWS


def _rows_meet(passes: _Passes, rows: Rows, once_BLD: Tensor) -> bool:
    """Return True when rows move though others alone have changed: one half of the batch, then the other half."""
    half = len(rows.ids_BL) // 2
    for mine, others in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        beside_BL = rows.ids_BL.clone()
        beside_BL[others] = rows.other_BL[others]
        if passes.differ(once_BLD, passes.run(beside_BL))[mine].any():
            return True
    return False


class _Passes:
    """Passes of one model that leave nothing behind."""

    def __init__(self, model: Any, positions_BL: Tensor) -> None:
        self.model, self.positions_BL = model, positions_BL
        self.device = positions_BL.device
        modules = list(model.modules()) if isinstance(model, nn.Module) else []
        self.modes = [(module, module.training) for module in modules]
        self.buffers = [(module, dict(module._buffers)) for module in modules if module._buffers]
        self.values = {
            buffer: buffer.clone()
            for _, buffers in self.buffers
            for buffer in buffers.values()
            if buffer is not None and not buffer.is_meta
        }
        self.is_wide = all(
            parameter.dtype in WIDE for module in modules for parameter in module.parameters(recurse=False)
        )
        # LLM.int8 looks for outliers in whole columns of a batch. That is rounding, but larger than a leak: without it
        # each token is rounded by itself.
        states: list[Any] = [module.state for module in modules if hasattr(module, "state")]
        self.thresholds = [(state, state.threshold) for state in states if hasattr(state, "threshold")]
        self.trains: bool = getattr(model, "training", False)
        self.in_training = self.changed_input = False
        self.are_finite = True

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Turn gradients off inside; put modes, buffers and random states back at the end."""
        cards = [self.device] if self.device.type == "cuda" else []
        python, arrays = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(cards), torch.no_grad():
            try:
                for state, _ in self.thresholds:
                    state.threshold = 0.0
                yield
            finally:
                for state, threshold in self.thresholds:
                    state.threshold = threshold
                self._put_back_buffers()
                self._put_back_modes()
                random.setstate(python)
                np.random.set_state(arrays)

    def run(self, ids_BL: Tensor) -> Tensor:
        """Return the hidden states `[B, L, D]` of one pass over the first B rows, as a copy: a body may use its memory
        again.
        """
        if self.in_training:
            self._put_back_modes()
            self._put_back_buffers()  # such as BatchNorm's running means, which each pass moves
            seed_all(0)
        elif isinstance(self.model, nn.Module):
            self.model.eval()
        own_BL = self.positions_BL[: len(ids_BL)]
        given_BL, positions_BL = ids_BL.clone(), own_BL.clone()
        # A document alone in its row and one behind another are attended to by other kernels, without masks. In 16 bits
        # a trained model makes some per cent of their rounding; under masks the kernel is one, and so are the answers.
        with contextlib.nullcontext() if self._is_exact() else masks_alone():
            hidden_BLD = hidden_states(self.model, given_BL, positions_BL).clone()
        self.changed_input |= not (torch.equal(given_BL, ids_BL) and torch.equal(positions_BL, own_BL))
        self.are_finite &= bool(hidden_BLD.isfinite().all())
        return hidden_BLD

    def differ(self, one_LD: Tensor, other_LD: Tensor) -> Tensor:
        """Return where hidden states differ by more than rounding, `[..., L]`.

        Two passes of one shape mostly agree to the bit; experts get other shares of the tokens, and int8 layers other
        outliers. A leak moves some position by far more.
        """
        tolerance = 1e-3 if self._is_exact() and one_LD.dtype in WIDE else 3e-2
        one_LD, other_LD = one_LD.float(), other_LD.float()
        return (one_LD - other_LD).norm(dim=-1) > tolerance * other_LD.norm(dim=-1)

    def _is_exact(self) -> bool:
        return self.is_wide and not torch.is_autocast_enabled(self.device.type)

    def _put_back_modes(self) -> None:
        for module, mode in self.modes:
            module.training = mode

    def _put_back_buffers(self) -> None:
        for module, buffers in self.buffers:
            module._buffers.update(buffers)
        for buffer, values in self.values.items():
            if not torch.equal(buffer, values):
                buffer.copy_(values)
