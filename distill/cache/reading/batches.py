"""Batches made from records: token ids stacked, targets of all positions row after row.

Shapes: B batch, L sequence length, N positions with loss in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from distill.cache.format.coding import SCALAR_STEP
from distill.cache.format.records import Record
from distill.targets.hidden import HiddenTargets
from distill.targets.sparse import SparseTargets


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
        """Return the batch on another device."""
        return moved(self, device)

    def rows(self, start: int, stop: int) -> Batch:
        """Return some of the samples, with their targets."""
        of_samples = slice(start, stop)
        begin, end = (int(self.loss_mask_BL[:row].sum()) for row in (start, stop))
        of_positions = slice(begin, end)
        return Batch(
            self.input_ids_BL[of_samples],
            self.position_ids_BL[of_samples],
            self.loss_mask_BL[of_samples],
            self.targets[of_positions],
            self.entropy_N[of_positions],
            self.surprisal_N[of_positions],
        )

    def without_loss(self) -> Batch:
        """Return the samples without the positions that carry loss."""
        none = slice(0, 0)
        return replace(
            self,
            loss_mask_BL=torch.zeros_like(self.loss_mask_BL),
            targets=self.targets[none],
            entropy_N=self.entropy_N[none],
            surprisal_N=self.surprisal_N[none],
        )


def collate(records: list[Record]) -> Batch:
    """Join records of one scheme to a batch; weights become float32."""
    return Batch(
        input_ids_BL=_stack([record.input_ids_L for record in records]),
        position_ids_BL=_stack([record.position_ids_L for record in records]),
        loss_mask_BL=_stack([record.loss_mask_L for record in records]).bool(),
        targets=_targets(records),
        entropy_N=_nats([record.entropy_N for record in records]),
        surprisal_N=_nats([record.surprisal_N for record in records]),
    )


def _targets(records: list[Record]) -> SparseTargets | HiddenTargets:
    if isinstance(records[0].targets, HiddenTargets):
        return HiddenTargets(torch.cat([cast(HiddenTargets, record.targets).hidden_ND for record in records]))
    targets = SparseTargets.cat([cast(SparseTargets, record.targets) for record in records])
    rest_N = None if targets.rest_N is None else targets.rest_N.float()
    return replace(targets, weights_T=targets.weights_T.float(), rest_N=rest_N)


def _stack(rows: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def _nats(steps: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(steps).astype(np.float32) * np.float32(SCALAR_STEP))


T = TypeVar("T")


def moved(value: T, device: torch.device) -> T:
    """Return a dataclass of tensors (and of such dataclasses) on another device."""
    return cast(T, _moved(value, device))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if value is None:
        return None
    return replace(value, **{field.name: _moved(getattr(value, field.name), device) for field in fields(value)})
