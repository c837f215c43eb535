"""A scheme: how a distribution becomes a sparse target, and how that is stored. One class a scheme, found by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distill.targets.random_draws import random_draws
from distill.targets.sparse import SparseTargets
from distill.targets.stored import coded_mask, decode_weights, encode_weights
from distill.targets.top_k import top_k
from distill.targets.varopt import varopt


class Scheme(Protocol):
    """Shapes: N positions, V vocabulary, K entries, U random numbers a position, C codes."""

    name: str

    @property
    def uniforms(self) -> int:
        """Random numbers it takes a position (U)."""
        ...

    @property
    def parameters(self) -> dict[str, Any]:
        """What the manifest says of it; `make(name, **parameters)` gives it back."""
        ...

    def sample(self, probs_NV: Tensor, uniform_NU: Tensor) -> SparseTargets:
        """Distributions to targets."""
        ...

    def coded_mask(self, heads_N: NDArray, atoms_N: NDArray, width: int) -> NDArray[np.bool_]:
        """Which places of `[N, width]` entries carry a code; those of a row stand side by side."""
        ...

    def encode(
        self, weights_NK: NDArray, heads_N: NDArray, atoms_N: NDArray, uniform_NU: NDArray
    ) -> NDArray[np.uint16]:
        """Weights to the codes that are stored."""
        ...

    def decode(self, codes_C: NDArray[np.uint16], heads_N: NDArray, atoms_N: NDArray) -> NDArray[np.float64]:
        """Codes to weights `[N, K]`, rows summing to 1."""
        ...


@dataclass(frozen=True)
class VarOpt:
    """Threshold sampling (`distill.targets.varopt`): one number for the atoms, one for each code's rounding."""

    threshold: float
    name = "varopt"

    @property
    def uniforms(self) -> int:
        return 1 + int(1 / self.threshold) + 2

    @property
    def parameters(self) -> dict[str, Any]:
        return {"threshold": self.threshold}

    def sample(self, probs_NV: Tensor, uniform_NU: Tensor) -> SparseTargets:
        return varopt(probs_NV, self.threshold, uniform_NU[:, 0])

    def coded_mask(self, heads_N: NDArray, atoms_N: NDArray, width: int) -> NDArray[np.bool_]:
        return coded_mask(heads_N, atoms_N, self.threshold, width)

    def encode(
        self, weights_NK: NDArray, heads_N: NDArray, atoms_N: NDArray, uniform_NU: NDArray
    ) -> NDArray[np.uint16]:
        coded = uniform_NU[:, 1 : 1 + weights_NK.shape[1]]
        # An atom's code never lies behind the columns: heads and the first atom are at most 1 / threshold + 2.
        padded = np.pad(coded, ((0, 0), (0, weights_NK.shape[1] - coded.shape[1])))
        return encode_weights(weights_NK, heads_N, atoms_N, self.threshold, padded)

    def decode(self, codes_C: NDArray[np.uint16], heads_N: NDArray, atoms_N: NDArray) -> NDArray[np.float64]:
        return decode_weights(codes_C, heads_N, atoms_N, self.threshold)


@dataclass(frozen=True)
class TopK:
    """The `entries` largest probabilities, renormalised (`distill.targets.top_k`)."""

    entries: int
    name = "top_k"

    @property
    def uniforms(self) -> int:
        return self.entries

    @property
    def parameters(self) -> dict[str, Any]:
        return {"entries": self.entries}

    def sample(self, probs_NV: Tensor, uniform_NU: Tensor) -> SparseTargets:
        return top_k(probs_NV, self.entries)

    def coded_mask(self, heads_N: NDArray, atoms_N: NDArray, width: int) -> NDArray[np.bool_]:
        return coded_mask(heads_N, atoms_N, 1.0, width)

    def encode(
        self, weights_NK: NDArray, heads_N: NDArray, atoms_N: NDArray, uniform_NU: NDArray
    ) -> NDArray[np.uint16]:
        return encode_weights(weights_NK, heads_N, atoms_N, 1.0, uniform_NU[:, : weights_NK.shape[1]])

    def decode(self, codes_C: NDArray[np.uint16], heads_N: NDArray, atoms_N: NDArray) -> NDArray[np.float64]:
        return decode_weights(codes_C, heads_N, atoms_N, 1.0)


@dataclass(frozen=True)
class RandomDraws:
    """`entries` draws with replacement (`distill.targets.random_draws`); a code is an id's number of draws: exact."""

    entries: int
    name = "random"

    @property
    def uniforms(self) -> int:
        return self.entries

    @property
    def parameters(self) -> dict[str, Any]:
        return {"entries": self.entries}

    def sample(self, probs_NV: Tensor, uniform_NU: Tensor) -> SparseTargets:
        return random_draws(probs_NV, uniform_NU)

    def coded_mask(self, heads_N: NDArray, atoms_N: NDArray, width: int) -> NDArray[np.bool_]:
        return np.arange(width) < heads_N[:, None]

    def encode(
        self, weights_NK: NDArray, heads_N: NDArray, atoms_N: NDArray, uniform_NU: NDArray
    ) -> NDArray[np.uint16]:
        is_entry_NK = self.coded_mask(heads_N, atoms_N, weights_NK.shape[1])
        return np.rint(weights_NK[is_entry_NK] * self.entries).astype(np.uint16)

    def decode(self, codes_C: NDArray[np.uint16], heads_N: NDArray, atoms_N: NDArray) -> NDArray[np.float64]:
        is_entry_NK = self.coded_mask(heads_N, atoms_N, int(heads_N.max(initial=0)))
        weights_NK = np.zeros(is_entry_NK.shape)
        weights_NK[is_entry_NK] = codes_C / self.entries
        return weights_NK


_SCHEMES: dict[str, type[VarOpt] | type[TopK] | type[RandomDraws]] = {
    scheme.name: scheme for scheme in (VarOpt, TopK, RandomDraws)
}


def make(name: str, **parameters: Any) -> Scheme:
    """The scheme of a name (`varopt`, `top_k`, `random`) with its parameters."""
    return _SCHEMES[name](**parameters)
