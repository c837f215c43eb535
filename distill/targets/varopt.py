"""Unbiased threshold sampling: probable tokens exactly, the tail by equal atoms (the default scheme).

Source: Cohen, Duffield, Kaplan, Lund, Thorup, "Stream sampling for variance-optimal estimation of subset sums"
(SODA 2009), with systematic sampling of the tail. Shapes: N positions, V vocabulary, E exact entries (padded), M tail
atoms (padded), K entries (padded), G tiles of S tokens each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.targets.sparse import SparseTargets, entry_mask

_TILE = 256
"""Tokens of a tile of the two-level cumulative sum (S)."""


def varopt(probs_NV: Tensor, threshold: float, uniform_N: Tensor) -> SparseTargets:
    """Make a sparse stand-in for each row of `probs_NV`: equal to it in expectation, weights summing to 1.

    Exact entries are all probabilities of at least `threshold`, and the largest one in any case. The remaining mass m
    is carried by `M = max(1, floor(m / threshold))` tail atoms of weight `m / M`, drawn by systematic sampling: point j
    of the row is `(uniform + j) * m / M` on the cumulative sum of the tail. An atom weighs at least as much as any tail
    token, so no token is drawn twice. A row without tail mass has exact entries alone.

    Args:
        probs_NV: distributions, rows summing to 1.
        threshold: in (0, 1]; a row has at most about `1 / threshold` entries.
        uniform_N: one number in [0, 1) a row, float64.
    """
    assert 0 < threshold <= 1
    exact_ids_NE, exact_weights_NE, exact_N = _exact(probs_NV, threshold)
    is_exact_NE = entry_mask(exact_N, exact_ids_NE.shape[1])
    # A place without an exact entry sets the row's first one to 0 once more.
    tail_NV = probs_NV.scatter(1, torch.where(is_exact_NE, exact_ids_NE, exact_ids_NE[:, :1]), 0)
    atom_ids_NM, weight_N, atoms_N = _atoms(tail_NV, threshold, uniform_N)
    return _join(exact_ids_NE, exact_weights_NE, exact_N, atom_ids_NM, weight_N.to(probs_NV.dtype), atoms_N)


def _exact(probs_NV: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids and probabilities of the largest tokens, falling, and how many of a row's are exact (at least 1)."""
    width = 64
    while True:
        width = min(width, probs_NV.shape[1])
        weights_NE, ids_NE = probs_NV.topk(width, dim=-1)
        exact_N = (weights_NE >= threshold).sum(-1).clamp(min=1)
        most = int(exact_N.max()) if len(exact_N) else 1
        if most < width or width == probs_NV.shape[1]:
            return ids_NE[:, :most], weights_NE[:, :most], exact_N
        width *= 4


def _atoms(tail_NV: Tensor, threshold: float, uniform_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sample the tail systematically: ids `[N, M]` (rising), the weight of a row's atoms, and their number.

    The cumulative sum is taken in two levels, over tiles of tokens and then inside the tiles that points fall into:
    one reading of the tail instead of writing a float64 copy of it.
    """
    tiles_NGS = torch.nn.functional.pad(tail_NV, (0, -tail_NV.shape[1] % _TILE)).unflatten(1, (-1, _TILE))
    # float64: points must fall on the right token of a vocabulary of 2^18, and the last one before the end.
    ends_NG = tiles_NGS.sum(-1, dtype=torch.float64).cumsum(-1)
    mass_N = ends_NG[:, -1]
    # An atom weighs the threshold or more (with one atom: the whole tail), so at least as much as any tail token.
    atoms_N = torch.where(mass_N > 0, (mass_N / threshold).floor().clamp(min=1), 0).long()
    weight_N = mass_N / atoms_N.clamp(min=1)
    width = int(atoms_N.max()) if len(atoms_N) else 0
    places_M = torch.arange(width, device=tail_NV.device)
    # One point in each of M equal intervals of the tail's mass: token t is hit p_t / weight times in expectation.
    points_NM = (uniform_N.double()[:, None] + places_M) * weight_N[:, None]
    # The last point may round up to the end, behind which there are only tokens without probability.
    points_NM = torch.minimum(points_NM, mass_N.nextafter(mass_N.new_zeros(()))[:, None])

    # right=True: token t is hit by points in [start, end), so a token without probability is never hit.
    tile_NM = torch.searchsorted(ends_NG, points_NM, right=True).clamp(max=ends_NG.shape[1] - 1)
    before_NM = torch.where(tile_NM > 0, ends_NG.gather(1, (tile_NM - 1).clamp(min=0)), 0)
    rows_N1 = torch.arange(len(tile_NM), device=tail_NV.device)[:, None]
    inside_NMS = tiles_NGS[rows_N1, tile_NM].cumsum(-1, dtype=torch.float64)
    # Rounding may leave a tile's own sum a hair below its share of `ends`: then the last token with mass is meant.
    offset_NM = torch.minimum(points_NM - before_NM, inside_NMS[..., -1].nextafter(points_NM.new_zeros(())))
    place_NM = torch.searchsorted(inside_NMS, offset_NM[..., None], right=True)[..., 0].clamp(max=_TILE - 1)
    return tile_NM * _TILE + place_NM, weight_N, atoms_N


def _join(
    exact_ids_NE: Tensor,
    exact_weights_NE: Tensor,
    exact_N: Tensor,
    atom_ids_NM: Tensor,
    weight_N: Tensor,
    atoms_N: Tensor,
) -> SparseTargets:
    """Put exact entries and atoms of each row side by side, without a gap."""
    counts_N = exact_N + atoms_N
    place_NK = torch.arange(int(counts_N.max()), device=counts_N.device).expand(len(counts_N), -1)
    from_exact_NK = place_NK.clamp(max=exact_ids_NE.shape[1] - 1)
    ids_NK, weights_NK = exact_ids_NE.gather(1, from_exact_NK), exact_weights_NE.gather(1, from_exact_NK)
    if atom_ids_NM.shape[1]:
        is_exact_NK = place_NK < exact_N[:, None]
        from_atom_NK = (place_NK - exact_N[:, None]).clamp(0, atom_ids_NM.shape[1] - 1)
        ids_NK = torch.where(is_exact_NK, ids_NK, atom_ids_NM.gather(1, from_atom_NK))
        weights_NK = torch.where(is_exact_NK, weights_NK, weight_N[:, None])
    return SparseTargets.of_rows(ids_NK, weights_NK, exact_N, counts_N)
