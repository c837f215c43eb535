"""The teacher's walk over a sample: hidden states to stored targets, a chunk of positions at a time.

Shapes: L sequence length, N positions with loss, D hidden size, V vocabulary, U random numbers a position.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.models.language_model import Head
from distill.targets.schemes import Scheme
from distill.targets.stored import StoredTargets, quantize_scalar
from distill.targets.uniforms import sample_uniforms


def next_ids(input_ids_BL: Tensor, loss_mask_BL: Tensor) -> Tensor:
    """`[N]` the true next token of every position with loss, row after row."""
    return input_ids_BL.roll(-1, dims=-1)[loss_mask_BL]


@torch.no_grad()
def extract(
    hidden_LD: Tensor,
    head: Head,
    input_ids_L: Tensor,
    position_ids_L: Tensor,
    loss_mask_L: Tensor,
    scheme: Scheme,
    *,
    seed: int,
    temperature: float = 1.0,
    chunk_size: int = 256,
) -> StoredTargets:
    """Stored targets of one sample's positions with loss.

    The random numbers depend on the seed and the sample alone, and chunks never reach into another sample, so that a
    sample's targets are the same in any batch (as far as its hidden states are).
    """
    hidden_ND, true_ids_N = hidden_LD[loss_mask_L], next_ids(input_ids_L, loss_mask_L)
    uniform_LU = sample_uniforms(seed, input_ids_L.cpu().numpy(), position_ids_L.cpu().numpy(), scheme.uniforms)
    uniform_NU = uniform_LU[loss_mask_L.cpu().numpy()]
    parts = [
        _extract_chunk(
            head(hidden_ND[i : i + chunk_size]).float() / temperature,
            true_ids_N[i : i + chunk_size],
            scheme,
            uniform_NU[i : i + chunk_size],
        )
        for i in range(0, len(hidden_ND), chunk_size)
    ]
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)] if parts else _nothing()
    return StoredTargets(*columns)


def _extract_chunk(
    logits_NV: Tensor, true_ids_N: Tensor, scheme: Scheme, uniform_NU: NDArray[np.float64]
) -> tuple[NDArray, ...]:
    log_probs_NV = torch.log_softmax(logits_NV, dim=-1)
    probs_NV = log_probs_NV.exp()
    entropy_N = -torch.linalg.vecdot(probs_NV, log_probs_NV)
    surprisal_N = -log_probs_NV.gather(1, true_ids_N[:, None])[:, 0]
    targets = scheme.sample(probs_NV, torch.from_numpy(uniform_NU).to(probs_NV.device))
    heads_N = targets.heads_N.cpu().numpy()
    counts_N = targets.counts_N.cpu().numpy()
    weights_NK = targets.weights_NK.double().cpu().numpy()
    codes_C = scheme.encode(weights_NK, heads_N, counts_N - heads_N, uniform_NU)
    is_entry_NK = np.arange(weights_NK.shape[1]) < counts_N[:, None]
    return (
        heads_N.astype(np.uint16),
        (counts_N - heads_N).astype(np.uint16),
        targets.ids_NK.cpu().numpy()[is_entry_NK].astype(np.uint32),
        codes_C,
        quantize_scalar(entropy_N.cpu().numpy()),
        quantize_scalar(surprisal_N.cpu().numpy()),
    )


def _nothing() -> list[NDArray]:
    empty16, empty32 = np.empty(0, np.uint16), np.empty(0, np.uint32)
    return [empty16, empty16, empty32, empty16, empty16, empty16]
