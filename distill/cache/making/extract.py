"""The teacher's walk over a sample: hidden states to a record, a chunk of positions and a block of its rows at a time.

Shapes: L sequence length, N positions with loss, C positions of a chunk, R rows of a block, D hidden size,
V vocabulary, U random numbers a position.
"""

from __future__ import annotations

from collections.abc import Iterator

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

SCRATCH_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
"""Bytes of a block of rows in float32, of which there are two: on a CPU they stay in its cache."""

_FEWEST_ROWS = 8
"""Fewest rows of a block, however large the vocabulary: each block costs some dozens of small kernels."""


class Scratch:
    """Memory that the walk uses again for each chunk and block, since new memory costs more than the work in it.

    `block_bytes` is the size of a block; by default that of the device's kind in `SCRATCH_BYTES`.
    """

    def __init__(self, block_bytes: int | None = None) -> None:
        self.block_bytes = block_bytes
        self._made: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `[rows, columns]` of any content: the same memory at each call with this name that it suffices for."""
        found = self._made.get(name)
        if found is None or found.numel() < rows * columns or (found.dtype, found.device) != (dtype, like.device):
            self._made[name] = like.new_empty(rows * columns, dtype=dtype)
        return self._made[name][: rows * columns].view(rows, columns)

    def blocks(self, rows: int, columns: int, device: torch.device) -> Iterator[slice]:
        """Return the blocks of a chunk's rows."""
        size = self.block_bytes or SCRATCH_BYTES["cpu" if device.type == "cpu" else "cuda"]
        step = max(_FEWEST_ROWS, size // (4 * columns))
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


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
    chunk_size: int = 512,
    scratch: Scratch | None = None,
) -> Record:
    """Make the record of one sample, with targets at its positions with loss.

    The random numbers depend on the seed and the sample alone, and chunks never reach into another sample, so that a
    sample's targets are the same in any batch (as far as its hidden states are). `hidden_LD` may end behind the last
    position with loss. `scratch` is that of earlier samples.
    """
    ids_L, positions_L = input_ids_L.cpu().numpy(), position_ids_L.cpu().numpy()
    mask_L = loss_mask_L.cpu().numpy()
    hidden_ND, true_ids_N = hidden_LD[loss_mask_L[: len(hidden_LD)]], next_ids(input_ids_L, loss_mask_L)
    if isinstance(scheme, Hidden):
        hidden_ND = hidden_ND.bfloat16()  # the scalars are those of the states that are kept
        uniform_NU = np.empty((len(hidden_ND), 0))
    else:
        uniform_NU = sample_uniforms(seed, ids_L, positions_L, scheme.uniforms)[mask_L]
    uniform = torch.from_numpy(uniform_NU).to(hidden_ND.device)
    parts, scalars, end = [], [torch.empty(2, 0, device=hidden_ND.device)], 0
    for probs_RV, scalars_2R in distributions(hidden_ND, head, true_ids_N, temperature, chunk_size, scratch):
        scalars.append(scalars_2R)
        begin, end = end, end + len(probs_RV)
        if not isinstance(scheme, Hidden):
            parts.append(scheme.sample(probs_RV, uniform[begin:end]))
    entropy_N, surprisal_N = (quantize_scalar(column) for column in torch.cat(scalars, dim=1).cpu().numpy())
    targets = HiddenTargets(hidden_ND.cpu()) if isinstance(scheme, Hidden) else _rounded(parts, scheme, uniform_NU)
    return Record(ids_L.astype(np.uint32), positions_L.astype(np.uint32), mask_L, targets, entropy_N, surprisal_N)


def distributions(
    hidden_ND: Tensor, head: Head, true_ids_N: Tensor, temperature: float, chunk_size: int, scratch: Scratch | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield blocks of rows `[R, V]` of probabilities, float32, and their scalars `[2, R]`: entropy and surprisal.

    With the logits z less their maximum, and the sum of their exponentials Z: p = exp(z) / Z, the entropy is
    log Z - sum(p z), and the surprisal of the true next token log Z - z[token]. A block is overwritten by the next.
    """
    scratch = scratch or Scratch()
    dtype, vocab_size = head.weight_VD.dtype, len(head.weight_VD)
    for first in range(0, len(hidden_ND), chunk_size):
        states_CD = hidden_ND[first : first + chunk_size]
        product_CV = head.product(states_CD, scratch.take("product", len(states_CD), vocab_size, hidden_ND, dtype))
        for rows in scratch.blocks(len(states_CD), vocab_size, hidden_ND.device):
            shape = rows.stop - rows.start, vocab_size
            logits_RV = head.transform(scratch.take("logits", *shape, hidden_ND, torch.float32).copy_(product_CV[rows]))
            if temperature != 1.0:
                logits_RV.div_(temperature)
            logits_RV.sub_(logits_RV.amax(1, keepdim=True))
            probs_RV = torch.exp(logits_RV, out=scratch.take("probs", *shape, hidden_ND, torch.float32))
            sums_R1 = probs_RV.sum(1, keepdim=True)
            probs_RV.div_(sums_R1)
            log_sums_R = sums_R1[:, 0].log()
            true_ids_R = true_ids_N[first : first + chunk_size][rows]
            surprisal_R = log_sums_R - logits_RV.gather(1, true_ids_R[:, None])[:, 0]
            # In place, and a sum in pairs: a product of matrices is slower here, and a plain dot product less exact.
            entropy_R = log_sums_R - logits_RV.mul_(probs_RV).sum(1)
            if not entropy_R.isfinite().all():
                raise UserError(
                    "the teacher's logits are not all finite (float16 overflows in some models): "
                    "set teacher.compute_dtype to bfloat16 or float32"
                )
            yield probs_RV, torch.stack([entropy_R, surprisal_R])


def _rounded(parts: list[SparseTargets], scheme: SparseScheme, uniform_NU: NDArray[np.float64]) -> SparseTargets:
    """Join the blocks' targets and round their weights, on the CPU."""
    if not parts:
        nothing = torch.empty(0, dtype=torch.int64)
        rest_N = torch.empty(0, dtype=torch.float64) if isinstance(scheme, TopK) else None
        return SparseTargets(nothing, nothing.double(), nothing, nothing, rest_N)
    return round_weights(scheme, SparseTargets.cat(parts).cpu(), uniform_NU)
