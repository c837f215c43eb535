"""Head codes: a probability as a whole number of 2 % steps below 1, rounded at random so that the mean is right."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

STEP = 1.02
"""Ratio of two neighbouring codes' values."""

CODES = 2048
"""Number of codes: the smallest value is 1.02^-2047, about 2e-18."""

_VALUES = np.power(STEP, -np.arange(CODES, dtype=np.float64))


def decode(codes: NDArray[np.integer]) -> NDArray[np.float64]:
    """`1.02 ** -codes`."""
    return _VALUES[codes]


def encode(values: NDArray[np.float64], uniform: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Codes of `values` in (0, 1]: one of the two neighbours, chosen by `uniform` so that E[decode(code)] = value.

    Values below the smallest code's (2e-18) take that code.
    """
    values = np.maximum(values, _VALUES[-1])
    lower = np.clip(np.ceil(-np.log(values) / math.log(STEP) - 1e-9), 0, CODES - 1).astype(np.int64)
    upper = np.maximum(lower - 1, 0)
    low, high = _VALUES[lower], _VALUES[upper]
    share = np.divide(values - low, high - low, out=np.zeros_like(values), where=high > low)
    return np.where(uniform < share, upper, lower).astype(np.uint16)
