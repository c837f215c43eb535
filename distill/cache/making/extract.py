"""The teacher's walk over a sample: hidden states to a record, a chunk of positions at a time.

Shapes: L sequence length, N positions with loss, D hidden size, V vocabulary, U random numbers a position.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.cache.format.coding import quantize_scalar, round_weights
from distill.cache.format.records import Record
from distill.errors import UserError
from distill.models.language_model import Head
from distill.targets.hidden import HiddenTargets
from distill.targets.next_token import next_ids
from distill.targets.schemes import AnyScheme, Hidden, SparseScheme, TopK
from distill.targets.sparse import SparseTargets
from distill.targets.uniforms import sample_uniforms


@torch.no_grad()
def extract(
    hidden_LD: Tensor,
    head: Head,
    input_ids_L: Tensor,
    position_ids_L: Tensor,
    loss_mask_L: Tensor,
    scheme: AnyScheme,
    *,
    seed: int,
    temperature: float = 1.0,
    chunk_size: int = 256,
) -> Record:
    """Make the record of one sample, with targets at its positions with loss.

    The random numbers depend on the seed and the sample alone, and chunks never reach into another sample, so that a
    sample's targets are the same in any batch (as far as its hidden states are).
    """
    ids_L, positions_L = input_ids_L.cpu().numpy(), position_ids_L.cpu().numpy()
    mask_L = loss_mask_L.cpu().numpy()
    hidden_ND, true_ids_N = hidden_LD[loss_mask_L], next_ids(input_ids_L, loss_mask_L)
    if isinstance(scheme, Hidden):
        hidden_ND = hidden_ND.bfloat16()
    else:
        uniform_NU = sample_uniforms(seed, ids_L, positions_L, scheme.uniforms)[mask_L]
    chunks, scalars = [], []
    for start in range(0, max(len(hidden_ND), 1), chunk_size):
        rows = slice(start, start + chunk_size)
        states_ND = hidden_ND[rows]
        if isinstance(scheme, Hidden):  # the scalars are those of the states that are kept
            states_ND = states_ND.to(head.weight_VD.dtype)
        log_probs_NV = torch.log_softmax(head(states_ND).float() / temperature, dim=-1)
        scalars.append(_scalars(log_probs_NV, true_ids_N[rows]))
        if not isinstance(scheme, Hidden):
            chunks.append(_sparse(log_probs_NV.exp_(), scheme, uniform_NU[rows]))
    entropy_N, surprisal_N = (np.concatenate(column) for column in zip(*scalars, strict=True))
    targets = SparseTargets.cat(chunks) if chunks else HiddenTargets(hidden_ND.cpu())
    return Record(ids_L.astype(np.uint32), positions_L.astype(np.uint32), mask_L, targets, entropy_N, surprisal_N)


def _scalars(log_probs_NV: Tensor, true_ids_N: Tensor) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Return entropy and negative log-probability of the true next token, as they are stored."""
    entropy_N = -torch.linalg.vecdot(log_probs_NV.exp(), log_probs_NV)
    surprisal_N = -log_probs_NV.gather(1, true_ids_N[:, None])[:, 0]
    if not entropy_N.isfinite().all():
        raise UserError(
            "the teacher's logits are not all finite (float16 overflows in some models): "
            "set teacher.compute_dtype to bfloat16 or float32"
        )
    return quantize_scalar(entropy_N.cpu().numpy()), quantize_scalar(surprisal_N.cpu().numpy())


def _sparse(probs_NV: Tensor, scheme: SparseScheme, uniform_NU: NDArray[np.float64]) -> SparseTargets:
    """Sample a chunk's targets and round their weights, on the CPU."""
    if not len(probs_NV):
        nothing = torch.empty(0, dtype=torch.int64)
        rest_N = torch.empty(0, dtype=torch.float64) if isinstance(scheme, TopK) else None
        return SparseTargets(nothing, nothing.double(), nothing, nothing, rest_N)
    sampled = scheme.sample(probs_NV, torch.from_numpy(uniform_NU).to(probs_NV.device))
    return round_weights(scheme, sampled.cpu(), uniform_NU)
