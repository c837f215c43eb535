"""Weights as they are stored: whole-number codes of a few weights a position, from which all of them come back.

Shapes: N positions, K entries of a target (padded), T entries of all positions, C codes of all positions,
U random numbers a position.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from distill.targets.schemes import RandomDraws, SparseScheme, TopK, VarOpt
from distill.targets.sparse import SparseTargets

SCALAR_STEP = 1 / 64
"""Resolution of the stored entropy and log-probability, in nats."""

STEP = 1.02
"""Ratio of the weights that two neighbouring codes stand for: code c stands for 1.02^-c."""

CODES = 2048
"""Number of codes: the smallest weight is 1.02^-2047, about 2e-18."""

VALUES = np.power(STEP, -np.arange(CODES, dtype=np.float64))
"""The weight that each code stands for."""


def quantize_scalar(nats_N: NDArray[np.floating]) -> NDArray[np.uint16]:
    """Turn nats into steps of 1/64; what lies above 1,023 nats is stored as 1,023."""
    return np.clip(np.rint(nats_N / SCALAR_STEP), 0, 2**16 - 1).astype(np.uint16)


def round_weights(scheme: SparseScheme, targets: SparseTargets, uniform_NU: NDArray[np.float64]) -> SparseTargets:
    """Replace the weights by some that codes stand for, float64: the same in expectation, by stochastic rounding.

    `encode` and `decode` are exact on the result. Shares of random draws are whole numbers already.
    """
    exact_N, atoms_N = _counts(targets)
    if isinstance(scheme, RandomDraws):
        return _with_weights(targets, *decode(scheme, encode(scheme, targets), exact_N, atoms_N))
    weights_NK = targets.padded()[1].double().numpy()
    if isinstance(scheme, VarOpt):
        codes_C = encode_rows(weights_NK, exact_N, atoms_N, _small_tail(scheme, atoms_N), uniform_NU[:, 1:])
        return _with_weights(targets, *decode(scheme, codes_C, exact_N, atoms_N))
    weights_NK = _with_rest(weights_NK)
    bucket_takes_rest_N = weights_NK[:, -1] >= weights_NK[:, 0]
    codes_C = encode_rows(weights_NK, exact_N, np.ones_like(exact_N), ~bucket_takes_rest_N, uniform_NU)
    return _with_weights(targets, *decode(scheme, codes_C, exact_N, bucket_takes_rest_N.astype(np.int64)))


def stored_atoms(scheme: SparseScheme, targets: SparseTargets) -> NDArray[np.int64]:
    """Return the number `[N]` that a record stores as each position's atoms, for weights that `round_weights` made.

    top_k has no atoms. Its number is 1 where the bucket takes the rest, and 0 where the first entry does, as in all
    caches that were made before there was a choice. A bucket with a code has the code's value to the last bit.
    """
    _, atoms_N = _counts(targets)
    if not isinstance(scheme, TopK):
        return atoms_N
    assert targets.rest_N is not None
    bucket_N = targets.rest_N.double().numpy()
    code_N = np.rint(-np.log(np.maximum(bucket_N, VALUES[-1])) / math.log(STEP)).astype(np.int64)
    return (VALUES[np.clip(code_N, 0, CODES - 1)] != bucket_N).astype(np.int64)


def coded_mask(scheme: SparseScheme, exact_N: NDArray, atoms_N: NDArray, width: int) -> NDArray[np.bool_]:
    """Return `[N, width]`: True where an entry carries a code. The other weights follow from the sum being 1.

    The code of an atom's weight lies in the first atom's place. Under top_k the bucket is coded like an atom, and
    `atoms_N` is that of `stored_atoms`.
    """
    if isinstance(scheme, RandomDraws):
        return np.arange(width) < exact_N[:, None]
    if isinstance(scheme, TopK):
        return coded_places(exact_N, np.ones_like(exact_N), atoms_N == 0, width)
    return coded_places(exact_N, atoms_N, _small_tail(scheme, atoms_N), width)


def encode(scheme: SparseScheme, targets: SparseTargets) -> NDArray[np.uint16]:
    """Return the codes `[C]` of weights that `round_weights` or `decode` made, position after position."""
    exact_N, atoms_N = targets.exact_N.numpy(), stored_atoms(scheme, targets)
    weights_NK = targets.padded()[1].double().numpy()
    if isinstance(scheme, TopK):
        assert targets.rest_N is not None
        rest_N1 = targets.rest_N.double().numpy()[:, None]
        # The rest lies right behind the exact entries, and under top_k all positions have as many.
        weights_NK = np.concatenate([weights_NK, rest_N1], axis=1)
    coded_NK = coded_mask(scheme, exact_N, atoms_N, weights_NK.shape[1])
    if isinstance(scheme, RandomDraws):
        return np.rint(weights_NK[coded_NK] * scheme.entries).astype(np.uint16)
    return np.rint(-np.log(weights_NK[coded_NK]) / math.log(STEP)).astype(np.uint16)


def decode(
    scheme: SparseScheme, codes_C: NDArray[np.uint16], exact_N: NDArray, atoms_N: NDArray
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Return the weights `[T]` of the codes, position after position, and the mass of the bucket `[N]` (top_k).

    `atoms_N` is that of `stored_atoms`.
    """
    counts_N = exact_N if isinstance(scheme, TopK) else exact_N + atoms_N
    rest_N = None
    if isinstance(scheme, RandomDraws):
        weights_NK = np.zeros((len(exact_N), int(counts_N.max(initial=0))))
        weights_NK[coded_mask(scheme, exact_N, atoms_N, weights_NK.shape[1])] = codes_C / scheme.entries
    elif isinstance(scheme, TopK):
        weights_NK = decode_rows(codes_C, exact_N, np.ones_like(exact_N), atoms_N == 0)
        # Without a position there is no bucket either.
        weights_NK, rest_N = (weights_NK[:, :-1], weights_NK[:, -1]) if len(weights_NK) else (weights_NK, np.empty(0))
    else:
        weights_NK = decode_rows(codes_C, exact_N, atoms_N, _small_tail(scheme, atoms_N))
    return weights_NK[np.arange(weights_NK.shape[1]) < counts_N[:, None]], rest_N


def _small_tail(scheme: VarOpt, atoms_N: NDArray) -> NDArray[np.bool_]:
    """Return the positions whose tail holds less than half of the mass, as far as the number of atoms tells."""
    return atoms_N * scheme.threshold < 0.5


def coded_places(exact_N: NDArray, atoms_N: NDArray, first_takes_rest_N: NDArray, width: int) -> NDArray[np.bool_]:
    """Return the coded places of rows whose other weights follow from the sum being 1.

    Where the most probable token takes the rest, the exact entries but the first are coded, and the weight of an atom.
    Elsewhere every exact entry is coded and the tail takes the rest. Whichever is larger should take it, because the
    others' rounding errors end there: a small weight could come out many times too large, or negative.
    """
    place_NK = np.arange(width)[None, :]
    is_exact_NK = place_NK < exact_N[:, None]
    codes_atom_NK = (place_NK == exact_N[:, None]) & (first_takes_rest_N & (atoms_N > 0))[:, None]
    return (is_exact_NK & ~((place_NK == 0) & first_takes_rest_N[:, None])) | codes_atom_NK


def encode_rows(
    weights_NK: NDArray[np.float64],
    exact_N: NDArray,
    atoms_N: NDArray,
    first_takes_rest_N: NDArray,
    uniform_NU: NDArray,
) -> NDArray[np.uint16]:
    """Choose codes of rows that sum to 1 by stochastic rounding.

    A row whose roundings, all upwards at once, would leave nothing for the weight that takes the rest is rounded down
    instead (possible only where dozens of equal exact entries share half of the mass).
    """
    # Columns that are added lie where nothing is coded.
    missing = max(0, weights_NK.shape[1] - uniform_NU.shape[1])
    uniform_NK = np.pad(uniform_NU, ((0, 0), (0, missing)))[:, : weights_NK.shape[1]]
    coded_NK = coded_places(exact_N, atoms_N, first_takes_rest_N, weights_NK.shape[1])
    codes_NK = np.zeros(weights_NK.shape, dtype=np.uint16)
    codes_NK[coded_NK] = nearby_codes(weights_NK[coded_NK], uniform_NK[coded_NK])
    negative_N = decode_rows(codes_NK[coded_NK], exact_N, atoms_N, first_takes_rest_N).min(axis=1, initial=0) < 0
    if negative_N.any():
        again_NK = coded_NK & negative_N[:, None]
        codes_NK[again_NK] = nearby_codes(weights_NK[again_NK], np.ones(int(again_NK.sum())))
    return codes_NK[coded_NK]


def nearby_codes(values: NDArray[np.float64], uniform: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Return one of the two neighbouring codes of `values` in (0, 1], chosen so that E[1.02^-code] = value.

    Values below the smallest code's (2e-18) take that code.
    """
    values = np.maximum(values, VALUES[-1])
    lower = np.clip(np.ceil(-np.log(values) / math.log(STEP) - 1e-9), 0, CODES - 1).astype(np.int64)
    upper = np.maximum(lower - 1, 0)
    low, high = VALUES[lower], VALUES[upper]
    share = np.divide(values - low, high - low, out=np.zeros_like(values), where=high > low)
    return np.where(uniform < share, upper, lower).astype(np.uint16)


def decode_rows(
    codes_C: NDArray[np.uint16], exact_N: NDArray, atoms_N: NDArray, first_takes_rest_N: NDArray
) -> NDArray[np.float64]:
    """Return padded weights `[N, K]`, each row summing to 1."""
    width = int((exact_N + atoms_N).max(initial=0))
    coded_NK = coded_places(exact_N, atoms_N, first_takes_rest_N, width)
    assert coded_NK.sum() == len(codes_C), "codes do not match the counts"
    values_NK = np.zeros((len(exact_N), width))
    values_NK[coded_NK] = VALUES[codes_C]
    place_NK = np.arange(width)[None, :]
    is_exact_NK = place_NK < exact_N[:, None]
    is_atom_NK = ~is_exact_NK & (place_NK < (exact_N + atoms_N)[:, None])
    exact_sum_N = np.where(is_exact_NK, values_NK, 0).sum(axis=1)
    atom_code_N = np.where(is_atom_NK, values_NK, 0).sum(axis=1)
    atom_N = np.where(first_takes_rest_N, atom_code_N, (1 - exact_sum_N) / np.maximum(atoms_N, 1))
    weights_NK = np.where(is_atom_NK, atom_N[:, None], np.where(is_exact_NK, values_NK, 0))
    if width:
        rest_N = 1 - exact_sum_N - atom_N * atoms_N
        weights_NK[:, 0] = np.where(first_takes_rest_N, rest_N, weights_NK[:, 0])
    return weights_NK


def _with_rest(weights_NK: NDArray[np.float64]) -> NDArray[np.float64]:
    """Add a column with the mass that is missing from 1."""
    rest_N1 = (1 - weights_NK.sum(axis=1, keepdims=True)).clip(min=0)
    return np.concatenate([weights_NK, rest_N1], axis=1)


def _counts(targets: SparseTargets) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return exact entries and tail atoms of each position."""
    exact_N = targets.exact_N.numpy()
    return exact_N, targets.counts_N.numpy() - exact_N


def _with_weights(
    targets: SparseTargets, weights_T: NDArray[np.float64], rest_N: NDArray[np.float64] | None
) -> SparseTargets:
    rest = None if rest_N is None else torch.from_numpy(rest_N)
    return SparseTargets(targets.ids_T, torch.from_numpy(weights_T), targets.exact_N, targets.counts_N, rest)
