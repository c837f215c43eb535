"""Records to a batch: token ids stacked, targets of all positions row after row.

Shapes: B batch, L sequence length, N positions with loss in the batch, K entries of a target (padded), D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from distill.cache.format.records import Record
from distill.cache.format.stored import SCALAR_STEP, StoredHidden, StoredTargets
from distill.targets.schemes import AnyScheme, Hidden
from distill.targets.sparse import SparseTargets


@dataclass(frozen=True)
class HiddenTargets:
    """The teacher's final hidden states, from which its head makes the exact distributions."""

    hidden_ND: Tensor
    """bfloat16."""


@dataclass(frozen=True)
class Batch:
    """Samples with the teacher's targets at their positions with loss, row after row."""

    input_ids_BL: Tensor
    position_ids_BL: Tensor
    loss_mask_BL: Tensor
    targets: SparseTargets | HiddenTargets
    entropy_N: Tensor
    """The teacher's entropy in nats."""
    surprisal_N: Tensor
    """The teacher's negative log-probability of the true next token in nats."""

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        return cast(Batch, _moved(self, device))

    def rows(self, start: int, stop: int) -> Batch:
        """Some of the samples, with their targets."""
        of_samples = slice(start, stop)
        begin, end = (int(self.loss_mask_BL[:row].sum()) for row in (start, stop))
        of_positions = slice(begin, end)
        return Batch(
            self.input_ids_BL[of_samples],
            self.position_ids_BL[of_samples],
            self.loss_mask_BL[of_samples],
            _sliced(self.targets, of_positions),
            self.entropy_N[of_positions],
            self.surprisal_N[of_positions],
        )

    def without_loss(self) -> Batch:
        """The samples, without the positions that carry loss."""
        none = slice(0, 0)
        return replace(
            self,
            loss_mask_BL=torch.zeros_like(self.loss_mask_BL),
            targets=_sliced(self.targets, none),
            entropy_N=self.entropy_N[none],
            surprisal_N=self.surprisal_N[none],
        )


def collate(records: list[Record], scheme: AnyScheme, draw: int = 0) -> Batch:
    """Records to one batch, with one of the cache's draws; targets are padded to the longest of them."""
    return Batch(
        input_ids_BL=_stack([record.input_ids_L for record in records]),
        position_ids_BL=_stack([record.position_ids_L for record in records]),
        loss_mask_BL=_stack([record.loss_mask_L for record in records]).bool(),
        targets=_targets(records, scheme, draw),
        entropy_N=_nats([record.targets.entropy_N for record in records]),
        surprisal_N=_nats([record.targets.surprisal_N for record in records]),
    )


def _targets(records: list[Record], scheme: AnyScheme, draw: int) -> SparseTargets | HiddenTargets:
    if isinstance(scheme, Hidden):
        bits_ND = np.concatenate([cast(StoredHidden, record.targets).bits_ND for record in records])
        return HiddenTargets(torch.from_numpy(bits_ND.view(np.int16).copy()).view(torch.bfloat16))
    stored = [cast(StoredTargets, record.targets) for record in records]
    heads_N = np.concatenate([targets.heads_N for targets in stored]).astype(np.int64)
    atoms_N = np.concatenate([targets.atoms_N for targets in stored]).astype(np.int64)
    codes_C = np.concatenate([targets.codes_C for targets in stored])
    weights_NK, rest_N = scheme.decode(codes_C, heads_N, atoms_N)
    ids_NK = np.zeros(weights_NK.shape, dtype=np.int64)
    is_entry_NK = np.arange(weights_NK.shape[1]) < (heads_N + atoms_N)[:, None]
    ids_NK[is_entry_NK] = np.concatenate([targets.draw(draw) for targets in stored])
    return SparseTargets(
        torch.from_numpy(ids_NK),
        torch.from_numpy(weights_NK).float(),
        torch.from_numpy(heads_N),
        torch.from_numpy(heads_N + atoms_N),
        None if rest_N is None else torch.from_numpy(rest_N).float(),
    )


def _stack(rows: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def _nats(steps: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(steps).astype(np.float32) * np.float32(SCALAR_STEP))


def _sliced(targets: Any, rows: slice) -> Any:
    """A dataclass of tensors over positions, of some of them."""
    values = {field.name: getattr(targets, field.name) for field in fields(targets)}
    return replace(targets, **{name: None if value is None else value[rows] for name, value in values.items()})


def _moved(value: Any, device: torch.device) -> Any:
    """A dataclass of tensors (and of such dataclasses) on another device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if value is None:
        return None
    return replace(value, **{field.name: _moved(getattr(value, field.name), device) for field in fields(value)})
