"""Unbiased threshold sampling: probable tokens exactly, the tail by equal atoms (the default scheme).

Source: Cohen, Duffield, Kaplan, Lund, Thorup, "Stream sampling for variance-optimal estimation of subset sums"
(SODA 2009), with systematic sampling of the tail. Shapes: N positions, V vocabulary, E exact entries (padded), M tail
atoms (padded), K entries (padded), G tiles of S tokens each, T tiles that are looked into, of all positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distill.targets.sparse import SparseTargets, entry_mask

_TILE = 256
"""Tokens of a tile (S): the distributions are read twice, for the tiles' maxima and sums, and then only in places."""

_TILES_AT_ONCE = 4096
"""Most tiles whose cumulative sums exist at one time (8 MB)."""


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
    tiles = _Tiles(probs_NV)
    maxima_NG = tiles.reduce(torch.amax)
    # A row without a probability of the threshold has one exact entry: the first of its largest.
    bound_N1 = maxima_NG.amax(1, keepdim=True).clamp(max=threshold)
    row_T, tile_T = _places(maxima_NG >= bound_N1)
    tokens_TS = tiles.tokens(row_T, tile_T)
    exact_ids_NE, exact_weights_NE, exact_N = _exact(tokens_TS, row_T, tiles.start(tile_T), bound_N1, threshold)

    def without_exact(tokens_TS: Tensor, row_T: Tensor, tile_T: Tensor) -> Tensor:
        """Set the exact entries to 0, in place."""
        place_T1 = (exact_ids_NE[row_T, 0] - tiles.start(tile_T))[:, None]
        largest_TS = torch.arange(tiles.size, device=place_T1.device) == place_T1
        return tokens_TS.masked_fill_((tokens_TS >= threshold) | largest_TS, 0)

    sums_NG = tiles.reduce(torch.sum)
    sums_NG[row_T, tile_T] = without_exact(tokens_TS, row_T, tile_T).sum(-1)
    atom_ids_NM, weight_N, atoms_N = _atoms(tiles, sums_NG, without_exact, threshold, uniform_N)
    return _join(exact_ids_NE, exact_weights_NE, exact_N, atom_ids_NM, weight_N.to(probs_NV.dtype), atoms_N)


def _places(mask: Tensor) -> tuple[Tensor, ...]:
    """Return rows and columns of what is True. The number is asked for by itself, as a forecast assumes few of them."""
    return torch.nonzero_static(mask, size=int(mask.sum())).unbind(1)


class _Tiles:
    """Rows of numbers, a token each, as tiles of `size` neighbours; the last tile may have fewer."""

    def __init__(self, values_NV: Tensor) -> None:
        self.values_NV = values_NV
        self.size = min(_TILE, values_NV.shape[1])

    def reduce(self, reduction: Callable[..., Tensor]) -> Tensor:
        """Return `[N, G]`, the reduction of each tile."""
        whole = self.values_NV.shape[1] // self.size * self.size
        tiles_NG = reduction(self.values_NV[:, :whole].unflatten(1, (-1, self.size)), dim=-1)
        if whole == self.values_NV.shape[1]:
            return tiles_NG
        return torch.cat([tiles_NG, reduction(self.values_NV[:, whole:], dim=-1, keepdim=True)], dim=1)

    def start(self, tile_T: Tensor) -> Tensor:
        """Return the token of the first place of each tile in `tokens`: the last tile begins inside the one before."""
        return (tile_T * self.size).clamp(max=self.values_NV.shape[1] - self.size)

    def tokens(self, row_T: Tensor, tile_T: Tensor) -> Tensor:
        """Return a copy `[T, S]` of some tiles; places of the last one that belong to the one before are 0."""
        tokens_TS = self.values_NV.unfold(1, self.size, 1)[row_T, self.start(tile_T)]
        if self.values_NV.shape[1] % self.size:
            before_T1 = (tile_T * self.size - self.start(tile_T))[:, None]
            tokens_TS.masked_fill_(torch.arange(self.size, device=tile_T.device) < before_T1, 0)
        return tokens_TS


def _exact(
    tokens_TS: Tensor, row_T: Tensor, start_T: Tensor, bound_N1: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows' exact entries: ids and probabilities, falling, and their number (at least 1).

    `tokens_TS` are the tiles in which they are, in the order of rows and tokens; equal ones stay in that order.
    """
    found, place = _places(tokens_TS >= bound_N1[row_T])
    row, weight, ids = row_T[found], tokens_TS[found, place], start_T[found] + place
    count_N = torch.zeros_like(bound_N1[:, 0], dtype=torch.int64).index_add_(0, row, torch.ones_like(row))
    rank = torch.arange(len(row), device=row.device) - (count_N.cumsum(0) - count_N)[row]
    exact_N = count_N.where(bound_N1[:, 0] >= threshold, 1)
    width = int(exact_N.max()) if len(exact_N) else 1
    # Other equals of a row's only exact entry go to a last column, which is dropped.
    column = rank.where(rank < exact_N[row], width)
    weights_NE = tokens_TS.new_zeros(len(bound_N1), width + 1).index_put_((row, column), weight)[:, :width]
    ids_NE = ids.new_zeros(len(bound_N1), width + 1).index_put_((row, column), ids)
    weights_NE, order_NE = weights_NE.sort(dim=1, descending=True, stable=True)
    return ids_NE.gather(1, order_NE), weights_NE, exact_N


def _atoms(
    tiles: _Tiles,
    sums_NG: Tensor,
    without_exact: Callable[[Tensor, Tensor, Tensor], Tensor],
    threshold: float,
    uniform_N: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample the tail systematically: ids `[N, M]` (rising), the weight of a row's atoms, and their number.

    The cumulative sum is taken in two levels: over the tiles' sums, and then inside the tiles that points fall into.
    """
    # float64: points must fall on the right token of a vocabulary of 2^18, and the last one before the end.
    ends_NG = sums_NG.cumsum(-1, dtype=torch.float64)
    mass_N = ends_NG[:, -1]
    # An atom weighs the threshold or more (with one atom: the whole tail), so at least as much as any tail token.
    atoms_N = torch.where(mass_N > 0, (mass_N / threshold).floor().clamp(min=1), 0).long()
    weight_N = mass_N / atoms_N.clamp(min=1)
    width = int(atoms_N.max()) if len(atoms_N) else 0
    places_M = torch.arange(width, device=mass_N.device)
    # One point in each of M equal intervals of the tail's mass: token t is hit p_t / weight times in expectation.
    points_NM = (uniform_N.double()[:, None] + places_M) * weight_N[:, None]
    # The last point may round up to the end, behind which there are only tokens without probability.
    points_NM = torch.minimum(points_NM, mass_N.nextafter(mass_N.new_zeros(()))[:, None])

    # right=True: token t is hit by points in [start, end), so a token without probability is never hit.
    tile_NM = torch.searchsorted(ends_NG, points_NM, right=True).clamp(max=ends_NG.shape[1] - 1)
    before_NM = torch.where(tile_NM > 0, ends_NG.gather(1, (tile_NM - 1).clamp(min=0)), 0)
    row, place = entry_mask(atoms_N, width).nonzero(as_tuple=True)
    tile, offset = tile_NM[row, place], (points_NM - before_NM)[row, place]
    ids_NM = torch.zeros_like(tile_NM)
    for start in range(0, len(row), _TILES_AT_ONCE):
        some = slice(start, start + _TILES_AT_ONCE)
        tail_TS = without_exact(tiles.tokens(row[some], tile[some]), row[some], tile[some])
        inside_TS = tail_TS.cumsum(-1, dtype=torch.float64)
        # Rounding may leave a tile's own sum a hair below its share of `ends`: then the last token with mass is meant.
        offset_T = torch.minimum(offset[some], inside_TS[:, -1].nextafter(offset.new_zeros(())))
        hit_T = torch.searchsorted(inside_TS, offset_T[:, None], right=True)[:, 0].clamp(max=tiles.size - 1)
        ids_NM[row[some], place[some]] = tiles.start(tile[some]) + hit_T
    return ids_NM, weight_N, atoms_N


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
