"""Unbiased threshold sampling: probable tokens exactly, the tail by equal atoms (the default scheme).

Source: Cohen, Duffield, Kaplan, Lund, Thorup, "Stream sampling for variance-optimal estimation of subset sums"
(SODA 2009), with systematic sampling of the tail. Shapes: N positions, V vocabulary, K entries, D draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.targets.sparse import SparseTargets, entry_mask

_BLOCK = 256
"""Tokens of a block of the two-level cumulative sum."""


def varopt(probs_NV: Tensor, threshold: float, uniform_N: Tensor) -> SparseTargets:
    """Sparse stand-in for each row of `probs_NV`: equal to it in expectation, weights summing to 1.

    Heads: every probability of at least `threshold`, and the largest one in any case. The remaining mass m is carried
    by `M = max(1, floor(m / threshold))` atoms of weight `m / M`, drawn by systematic sampling: point j of the row is
    `(uniform + j) * m / M` on the cumulative sum of the tail. An atom weighs at least what any tail token does, so no
    token is drawn twice. A row without tail mass has heads alone.

    Args:
        probs_NV: distributions, rows summing to 1.
        threshold: in (0, 1]; a row has at most about `1 / threshold` entries.
        uniform_N: one number in [0, 1) a row, float64.
    """
    return varopt_draws(probs_NV, threshold, uniform_N[:, None])[0]


def varopt_draws(probs_NV: Tensor, threshold: float, uniform_ND: Tensor) -> list[SparseTargets]:
    """D independent targets of each row: the heads are the same, the atoms are drawn anew by each column of numbers."""
    assert 0 < threshold <= 1
    head_ids_NH, head_weights_NH, heads_N = _heads(probs_NV, threshold)
    is_head_NH = entry_mask(heads_N, head_ids_NH.shape[1])
    # A place without a head writes the row's first head once more.
    tail_NV = probs_NV.scatter(1, torch.where(is_head_NH, head_ids_NH, head_ids_NH[:, :1]), 0)
    atom_ids_NDM, weight_N, atoms_N = _atoms(tail_NV, threshold, uniform_ND)
    head_weights_NH, weight_N = head_weights_NH * is_head_NH, weight_N.to(probs_NV.dtype)
    return [
        _join(head_ids_NH, head_weights_NH, heads_N, atom_ids_NM, weight_N, atoms_N)
        for atom_ids_NM in atom_ids_NDM.unbind(1)
    ]


def _heads(probs_NV: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and probabilities of the largest entries, falling, and how many of a row's are heads (at least 1)."""
    width = 64
    while True:
        width = min(width, probs_NV.shape[1])
        weights_NH, ids_NH = probs_NV.topk(width, dim=-1)
        heads_N = (weights_NH >= threshold).sum(-1).clamp(min=1)
        most = int(heads_N.max()) if len(heads_N) else 1
        if most < width or width == probs_NV.shape[1]:
            return ids_NH[:, :most], weights_NH[:, :most], heads_N
        width *= 4


def _atoms(tail_NV: Tensor, threshold: float, uniform_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Systematic sampling of the tail: ids `[N, D, M]` (rising), the weight of a row's atoms, and their number.

    The cumulative sum is taken in two levels, over blocks of tokens and then inside the blocks that points fall into:
    one reading of the tail instead of writing a float64 copy of it.
    """
    blocks_NGB = torch.nn.functional.pad(tail_NV, (0, -tail_NV.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    # float64: points must fall on the right token of a vocabulary of 2^18, and the last one before the end.
    ends_NG = blocks_NGB.sum(-1, dtype=torch.float64).cumsum(-1)
    mass_N = ends_NG[:, -1]
    atoms_N = torch.where(mass_N > 0, (mass_N / threshold).floor().clamp(min=1), 0).long()
    weight_N = mass_N / atoms_N.clamp(min=1)
    width = int(atoms_N.max()) if len(atoms_N) else 0
    places_M = torch.arange(width, device=tail_NV.device)
    points_NM = ((uniform_ND.double()[:, :, None] + places_M) * weight_N[:, None, None]).flatten(1)
    # The last point may round up to the end, behind which there are only tokens without probability.
    points_NM = torch.minimum(points_NM, mass_N.nextafter(mass_N.new_zeros(()))[:, None])

    block_NM = torch.searchsorted(ends_NG, points_NM, right=True).clamp(max=ends_NG.shape[1] - 1)
    before_NM = torch.where(block_NM > 0, ends_NG.gather(1, (block_NM - 1).clamp(min=0)), 0)
    rows_N1 = torch.arange(len(block_NM), device=tail_NV.device)[:, None]
    inside_NMB = blocks_NGB[rows_N1, block_NM].cumsum(-1, dtype=torch.float64)
    # Rounding may leave a block's own sum a hair below its share of `ends`: then the last token with mass is meant.
    offset_NM = torch.minimum(points_NM - before_NM, inside_NMB[..., -1].nextafter(points_NM.new_zeros(())))
    place_NM = torch.searchsorted(inside_NMB, offset_NM[..., None], right=True)[..., 0].clamp(max=_BLOCK - 1)
    return (block_NM * _BLOCK + place_NM).unflatten(1, (uniform_ND.shape[1], width)), weight_N, atoms_N


def _join(
    head_ids_NH: Tensor,
    head_weights_NH: Tensor,
    heads_N: Tensor,
    atom_ids_NM: Tensor,
    weight_N: Tensor,
    atoms_N: Tensor,
) -> SparseTargets:
    """Heads and atoms of each row side by side, without a gap."""
    counts_N = heads_N + atoms_N
    place_NK = torch.arange(int(counts_N.max()), device=counts_N.device).expand(len(counts_N), -1)
    is_head_NK = place_NK < heads_N[:, None]
    is_entry_NK = place_NK < counts_N[:, None]
    from_head_NK = place_NK.clamp(max=head_ids_NH.shape[1] - 1)
    ids_NK, weights_NK = head_ids_NH.gather(1, from_head_NK), head_weights_NH.gather(1, from_head_NK)
    if atom_ids_NM.shape[1]:
        from_atom_NK = (place_NK - heads_N[:, None]).clamp(0, atom_ids_NM.shape[1] - 1)
        ids_NK = torch.where(is_head_NK, ids_NK, atom_ids_NM.gather(1, from_atom_NK))
        weights_NK = torch.where(is_head_NK, weights_NK, weight_N[:, None])
    # ids of padding are 0, so that a gather stays inside the vocabulary
    return SparseTargets(ids_NK * is_entry_NK, weights_NK * is_entry_NK, heads_N, counts_N)
