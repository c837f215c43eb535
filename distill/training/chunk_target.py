"""The targets of a batch in the form that a loss takes, on the device where it is computed.

Shapes: N positions with loss in the batch.
"""

from __future__ import annotations

import torch

from distill.cache.reading.batches import Batch, moved
from distill.errors import UserError
from distill.losses.chunks import ChunkTarget, DenseChunk, SparseChunk
from distill.models.language_model import Head
from distill.targets.hidden import HiddenTargets
from distill.targets.next_token import next_ids


def chunk_target(
    batch: Batch,
    device: torch.device | str = "cpu",
    teacher_head: Head | None = None,
    temperature: float = 1.0,
) -> ChunkTarget:
    """Return the targets of all N positions of a batch, in the order of `hidden_BLD[batch.loss_mask_BL]`.

    `batch` is on the host, as a reader's `collate` makes it. A cache of hidden states needs the `teacher_head` that
    lies beside it, and its `temperature`, which sparse targets have in them already. Raises UserError without the head.
    """
    device = torch.device(device)
    true_ids_N, targets = next_ids(batch.input_ids_BL, batch.loss_mask_BL), batch.targets
    if isinstance(targets, HiddenTargets):
        if teacher_head is None:
            raise UserError("chunk_target: hidden states need the teacher's head: give reader.teacher_head")
        hidden_ND, true_ids_N = (each.to(device, non_blocking=True) for each in (targets.hidden_ND, true_ids_N))
        return DenseChunk(hidden_ND, teacher_head.to(device), true_ids_N, temperature)
    return moved(SparseChunk(*targets.padded(), batch.entropy_N, true_ids_N, targets.rest_N), device)
