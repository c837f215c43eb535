"""Targets as they are stored: small whole numbers, from which ids and weights come back.

Shapes: N positions, K entries of a target (padded), T entries of all positions, C codes of all positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from distill.cache.format import codes

SCALAR_STEP = 1 / 64
"""Resolution of the stored entropy and log-probability, in nats."""


@dataclass(frozen=True)
class StoredTargets:
    """The targets of a sample. Entries lie position after position: heads (falling weight), then atoms (rising id)."""

    heads_N: NDArray[np.uint16]
    """Heads of each position."""
    atoms_N: NDArray[np.uint16]
    """Tail atoms of each position."""
    ids_T: NDArray[np.uint32]
    """Token ids."""
    codes_C: NDArray[np.uint16]
    """Weights, as the scheme codes them."""
    entropy_N: NDArray[np.uint16]
    """The teacher's entropy, in steps of 1/64 nat."""
    surprisal_N: NDArray[np.uint16]
    """The teacher's negative log-probability of the true next token, in steps of 1/64 nat (at most 1,023 nats)."""
    further_DA: NDArray[np.uint32] = field(default_factory=lambda: np.empty((0, 0), np.uint32))
    """Ids of the atoms of all positions, for each draw after the first."""

    @property
    def entries(self) -> int:
        """Entries of all positions, in one draw."""
        return len(self.ids_T)

    def with_draw(self, number: int) -> StoredTargets:
        """The targets of one of the draws alone."""
        return replace(self, ids_T=self.draw(number), further_DA=self.further_DA[:0])

    def draw(self, number: int) -> NDArray[np.uint32]:
        """`ids_T` of one of the draws: draws are used in turn, so any number is good."""
        number %= 1 + len(self.further_DA)
        if number == 0:
            return self.ids_T
        heads_N, counts_N = self.split()
        is_entry_NK = np.arange(int(counts_N.max(initial=0))) < counts_N[:, None]
        is_atom_NK = is_entry_NK & (np.arange(is_entry_NK.shape[1]) >= heads_N[:, None])
        ids_NK = np.zeros(is_entry_NK.shape, dtype=np.uint32)
        ids_NK[is_entry_NK] = self.ids_T
        ids_NK[is_atom_NK] = self.further_DA[number - 1]
        return ids_NK[is_entry_NK]

    def split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Heads and counts (heads and atoms) of each position, wide enough to compute with."""
        heads_N = self.heads_N.astype(np.int64)
        return heads_N, heads_N + self.atoms_N


@dataclass(frozen=True)
class StoredHidden:
    """The teacher's hidden states of one sample's positions with loss (scheme `hidden`)."""

    bits_ND: NDArray[np.uint16]
    """bfloat16, as its bits."""
    entropy_N: NDArray[np.uint16]
    """As in StoredTargets."""
    surprisal_N: NDArray[np.uint16]
    """As in StoredTargets."""

    @property
    def entries(self) -> int:
        """None: nothing was left out of the distributions."""
        return 0


def quantize_scalar(nats_N: NDArray[np.floating]) -> NDArray[np.uint16]:
    """Nats to steps of 1/64; what lies above 1,023 nats is stored as that."""
    return np.clip(np.rint(nats_N / SCALAR_STEP), 0, 2**16 - 1).astype(np.uint16)


def coded_mask(heads_N: NDArray, atoms_N: NDArray, threshold: float, width: int) -> NDArray[np.bool_]:
    """Which places of `[N, width]` entries carry a code; the weight of the others follows from the sum being 1.

    Where the tail holds at least half, every head is coded and the tail takes the rest. Elsewhere the heads but the
    first are coded, and the weight of an atom (in the first atom's place): the most probable token takes the rest.
    Either way the part that takes the rest is large beside the rounding errors of the others.
    """
    heads_N, atoms_N = heads_N.astype(np.int64), atoms_N.astype(np.int64)
    place_NK = np.arange(width)[None, :]
    first_takes_rest_N = atoms_N * threshold < 0.5
    is_head_NK = place_NK < heads_N[:, None]
    codes_atom_NK = (place_NK == heads_N[:, None]) & (first_takes_rest_N & (atoms_N > 0))[:, None]
    return (is_head_NK & ~((place_NK == 0) & first_takes_rest_N[:, None])) | codes_atom_NK


def encode_weights(
    weights_NK: NDArray[np.float64], heads_N: NDArray, atoms_N: NDArray, threshold: float, uniform_NK: NDArray
) -> NDArray[np.uint16]:
    """Codes of padded weights whose rows sum to 1, unbiased by stochastic rounding (`codes.encode`).

    A row whose roundings, all upwards at once, would leave nothing for the part that takes the rest is rounded down
    instead (possible only where dozens of equal heads share half of the mass).
    """
    coded_NK = coded_mask(heads_N, atoms_N, threshold, weights_NK.shape[1])
    codes_NK = np.zeros(weights_NK.shape, dtype=np.uint16)
    codes_NK[coded_NK] = codes.encode(weights_NK[coded_NK], uniform_NK[coded_NK])
    negative_N = decode_weights(codes_NK[coded_NK], heads_N, atoms_N, threshold).min(axis=1, initial=0) < 0
    if negative_N.any():
        again_NK = coded_NK & negative_N[:, None]
        codes_NK[again_NK] = codes.encode(weights_NK[again_NK], np.ones(int(again_NK.sum())))
    return codes_NK[coded_NK]


def decode_weights(
    codes_C: NDArray[np.uint16], heads_N: NDArray, atoms_N: NDArray, threshold: float
) -> NDArray[np.float64]:
    """Padded weights `[N, K]`, each row summing to 1, from the codes that `encode_weights` made."""
    heads_N, atoms_N = heads_N.astype(np.int64), atoms_N.astype(np.int64)
    width = int((heads_N + atoms_N).max(initial=0))
    coded_NK = coded_mask(heads_N, atoms_N, threshold, width)
    assert coded_NK.sum() == len(codes_C), "codes do not match the counts"
    values_NK = np.zeros((len(heads_N), width))
    values_NK[coded_NK] = codes.decode(codes_C)
    place_NK = np.arange(width)[None, :]
    is_head_NK = place_NK < heads_N[:, None]
    is_atom_NK = ~is_head_NK & (place_NK < (heads_N + atoms_N)[:, None])
    heads_sum_N = np.where(is_head_NK, values_NK, 0).sum(axis=1)
    atom_code_N = np.where(is_atom_NK, values_NK, 0).sum(axis=1)
    first_takes_rest_N = atoms_N * threshold < 0.5
    atom_N = np.where(first_takes_rest_N, atom_code_N, (1 - heads_sum_N) / np.maximum(atoms_N, 1))
    weights_NK = np.where(is_atom_NK, atom_N[:, None], np.where(is_head_NK, values_NK, 0))
    if width:
        rest_N = 1 - heads_sum_N - atom_N * atoms_N
        weights_NK[:, 0] = np.where(first_takes_rest_N, rest_N, weights_NK[:, 0])
    return weights_NK
