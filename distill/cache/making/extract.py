"""The teacher's walk over a sample: hidden states to stored targets, a chunk of positions at a time.

Shapes: L sequence length, N positions with loss, D hidden size, V vocabulary, K entries, U random numbers a position.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.cache.format.stored import StoredHidden, StoredTargets, quantize_scalar
from distill.errors import UserError
from distill.models.language_model import Head
from distill.targets.next_token import next_ids
from distill.targets.schemes import AnyScheme, Hidden, Scheme
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
) -> StoredTargets | StoredHidden:
    """Stored targets of one sample's positions with loss.

    The random numbers depend on the seed and the sample alone, and chunks never reach into another sample, so that a
    sample's targets are the same in any batch (as far as its hidden states are).
    """
    hidden_ND, true_ids_N = hidden_LD[loss_mask_L], next_ids(input_ids_L, loss_mask_L)
    chunks = [slice(start, start + chunk_size) for start in range(0, max(len(hidden_ND), 1), chunk_size)]
    if isinstance(scheme, Hidden):
        # The scalars are those of the states that are kept.
        hidden_ND = hidden_ND.bfloat16()
        bits_ND = hidden_ND.cpu().view(torch.int16).numpy().view(np.uint16)
        scalars = [
            _scalars(_log_probs(hidden_ND[rows].to(head.weight_VD.dtype), head, temperature), true_ids_N[rows])
            for rows in chunks
        ]
        return StoredHidden(bits_ND, *_joined(scalars))
    uniform_LU = sample_uniforms(seed, input_ids_L.cpu().numpy(), position_ids_L.cpu().numpy(), scheme.uniforms)
    uniform_NU = uniform_LU[loss_mask_L.cpu().numpy()]
    parts = []
    for rows in chunks:
        log_probs_NV = _log_probs(hidden_ND[rows], head, temperature)
        entropy_N, surprisal_N = _scalars(log_probs_NV, true_ids_N[rows])
        heads_N, atoms_N, ids_T, codes_C, further_AD = _sparse(log_probs_NV.exp_(), scheme, uniform_NU[rows])
        parts.append((heads_N, atoms_N, ids_T, codes_C, entropy_N, surprisal_N, further_AD))
    heads_N, atoms_N, ids_T, codes_C, entropy_N, surprisal_N, further_AD = _joined(parts)
    return StoredTargets(heads_N, atoms_N, ids_T, codes_C, entropy_N, surprisal_N, further_AD.T)


def _log_probs(hidden_ND: Tensor, head: Head, temperature: float) -> Tensor:
    return torch.log_softmax(head(hidden_ND).float() / temperature, dim=-1)


def _scalars(log_probs_NV: Tensor, true_ids_N: Tensor) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Entropy and negative log-probability of the true next token, as they are stored."""
    entropy_N = -torch.linalg.vecdot(log_probs_NV.exp(), log_probs_NV)
    surprisal_N = -log_probs_NV.gather(1, true_ids_N[:, None])[:, 0]
    if not entropy_N.isfinite().all():
        raise UserError(
            "the teacher's logits are not all finite (float16 overflows in some models): "
            "set teacher.compute_dtype to bfloat16 or float32"
        )
    return quantize_scalar(entropy_N.cpu().numpy()), quantize_scalar(surprisal_N.cpu().numpy())


def _sparse(probs_NV: Tensor, scheme: Scheme, uniform_NU: NDArray[np.float64]) -> tuple[NDArray, ...]:
    """heads_N, atoms_N, ids_T, codes_C, and the atoms of further draws `[A, D - 1]`."""
    if not len(probs_NV):
        nothing = np.empty(0, np.uint16)
        return nothing, nothing, np.empty(0, np.uint32), nothing, np.empty((0, scheme.draws - 1), np.uint32)
    draws = scheme.sample(probs_NV, torch.from_numpy(uniform_NU).to(probs_NV.device))
    heads_N, counts_N = draws[0].heads_N.cpu().numpy(), draws[0].counts_N.cpu().numpy()
    weights_NK = draws[0].weights_NK.double().cpu().numpy()
    place_NK = np.arange(weights_NK.shape[1])[None, :]
    is_entry_NK = place_NK < counts_N[:, None]
    is_atom_NK = is_entry_NK & (place_NK >= heads_N[:, None])
    ids = [draw.ids_NK.cpu().numpy().astype(np.uint32) for draw in draws]
    return (
        heads_N.astype(np.uint16),
        (counts_N - heads_N).astype(np.uint16),
        ids[0][is_entry_NK],
        scheme.encode(weights_NK, heads_N, counts_N - heads_N, uniform_NU),
        np.stack([ids_NK[is_atom_NK] for ids_NK in ids], axis=1)[:, 1:],
    )


def _joined(parts: Sequence[tuple[NDArray, ...]]) -> list[NDArray]:
    return [np.concatenate(column) for column in zip(*parts, strict=True)]
