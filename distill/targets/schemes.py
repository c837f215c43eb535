"""A scheme: how a distribution becomes a target, and how that is stored. One class a scheme, found by its name."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distill.cache.format.stored import coded_mask, decode_weights, encode_weights
from distill.targets.random_draws import random_draws
from distill.targets.sparse import SparseTargets
from distill.targets.top_k import top_k
from distill.targets.varopt import varopt_draws


class Scheme(Protocol):
    """A sparse scheme. Shapes: N positions, V vocabulary, K entries, U random numbers a position, C codes."""

    @property
    def draws(self) -> int:
        """Independent targets of a position."""
        ...

    @property
    def uniforms(self) -> int:
        """Random numbers it takes a position (U)."""
        ...

    def sample(self, probs_NV: Tensor, uniform_NU: Tensor) -> list[SparseTargets]:
        """Distributions to targets, one batch of them a draw; draws differ in the ids of their atoms alone."""
        ...

    def coded_mask(self, heads_N: NDArray, atoms_N: NDArray, width: int) -> NDArray[np.bool_]:
        """Which places of `[N, width]` carry a code, side by side in a row: entries, and the place behind the heads."""
        ...

    def encode(
        self, weights_NK: NDArray, heads_N: NDArray, atoms_N: NDArray, uniform_NU: NDArray
    ) -> NDArray[np.uint16]:
        """Weights to the codes that are stored."""
        ...

    def decode(self, codes_C: NDArray[np.uint16], heads_N: NDArray, atoms_N: NDArray) -> tuple[NDArray, NDArray | None]:
        """Codes to weights `[N, K]` and the mass of the rest `[N]` (None: the weights sum to 1)."""
        ...


@dataclass(frozen=True)
class VarOpt:
    """Threshold sampling (`distill.targets.varopt`): a number for each draw, and one for each code's rounding."""

    threshold: float
    draws: int = 1
    name = "varopt"

    @property
    def uniforms(self) -> int:
        # Coded are the heads and the first atom, at most 1 / threshold + 2 places.
        return self.draws + int(1 / self.threshold) + 2

    def sample(self, probs_NV: Tensor, uniform_NU: Tensor) -> list[SparseTargets]:
        return varopt_draws(probs_NV, self.threshold, uniform_NU[:, : self.draws])

    def coded_mask(self, heads_N: NDArray, atoms_N: NDArray, width: int) -> NDArray[np.bool_]:
        return coded_mask(heads_N, atoms_N, self.threshold, width)

    def encode(
        self, weights_NK: NDArray, heads_N: NDArray, atoms_N: NDArray, uniform_NU: NDArray
    ) -> NDArray[np.uint16]:
        uniform_NK = _widened(uniform_NU[:, self.draws :], weights_NK.shape[1])
        return encode_weights(weights_NK, heads_N, atoms_N, self.threshold, uniform_NK)

    def decode(self, codes_C: NDArray[np.uint16], heads_N: NDArray, atoms_N: NDArray) -> tuple[NDArray, None]:
        return decode_weights(codes_C, heads_N, atoms_N, self.threshold), None


@dataclass(frozen=True)
class TopK:
    """The `entries` largest probabilities and one bucket for the rest (`distill.targets.top_k`).

    The bucket is coded like one atom behind the heads; only it has no id.
    """

    entries: int
    name = "top_k"
    draws = 1

    @property
    def uniforms(self) -> int:
        return self.entries + 1

    def sample(self, probs_NV: Tensor, uniform_NU: Tensor) -> list[SparseTargets]:
        return [top_k(probs_NV, self.entries)]

    def coded_mask(self, heads_N: NDArray, atoms_N: NDArray, width: int) -> NDArray[np.bool_]:
        return coded_mask(heads_N, np.ones_like(heads_N), 0.0, width)

    def encode(
        self, weights_NK: NDArray, heads_N: NDArray, atoms_N: NDArray, uniform_NU: NDArray
    ) -> NDArray[np.uint16]:
        rest_N1 = (1 - weights_NK.sum(axis=1, keepdims=True)).clip(min=0)
        all_NK = np.concatenate([weights_NK, rest_N1], axis=1)
        return encode_weights(all_NK, heads_N, np.ones_like(heads_N), 0.0, _widened(uniform_NU, all_NK.shape[1]))

    def decode(self, codes_C: NDArray[np.uint16], heads_N: NDArray, atoms_N: NDArray) -> tuple[NDArray, NDArray]:
        all_NK = decode_weights(codes_C, heads_N, np.ones_like(heads_N), 0.0)
        # Without a position there is no bucket either.
        return (all_NK[:, :-1], all_NK[:, -1]) if len(all_NK) else (all_NK, np.empty(0))


@dataclass(frozen=True)
class RandomDraws:
    """`entries` draws with replacement from p^exponent (`distill.targets.random_draws`).

    With exponent 1 a code is an id's number of draws, which is exact.
    """

    entries: int
    exponent: float = 1.0
    name = "random"
    draws = 1

    @property
    def uniforms(self) -> int:
        return self.entries + (0 if self.exponent == 1 else self.entries)

    def sample(self, probs_NV: Tensor, uniform_NU: Tensor) -> list[SparseTargets]:
        return [random_draws(probs_NV, uniform_NU[:, : self.entries], self.exponent)]

    def coded_mask(self, heads_N: NDArray, atoms_N: NDArray, width: int) -> NDArray[np.bool_]:
        if self.exponent != 1:
            return coded_mask(heads_N, atoms_N, 0.0, width)
        return np.arange(width) < heads_N[:, None]

    def encode(
        self, weights_NK: NDArray, heads_N: NDArray, atoms_N: NDArray, uniform_NU: NDArray
    ) -> NDArray[np.uint16]:
        if self.exponent != 1:
            return encode_weights(
                weights_NK, heads_N, atoms_N, 0.0, _widened(uniform_NU[:, self.entries :], weights_NK.shape[1])
            )
        is_entry_NK = self.coded_mask(heads_N, atoms_N, weights_NK.shape[1])
        return np.rint(weights_NK[is_entry_NK] * self.entries).astype(np.uint16)

    def decode(self, codes_C: NDArray[np.uint16], heads_N: NDArray, atoms_N: NDArray) -> tuple[NDArray, None]:
        if self.exponent != 1:
            return decode_weights(codes_C, heads_N, atoms_N, 0.0), None
        is_entry_NK = self.coded_mask(heads_N, atoms_N, int(heads_N.max(initial=0)))
        weights_NK = np.zeros(is_entry_NK.shape)
        weights_NK[is_entry_NK] = codes_C / self.entries
        return weights_NK, None


@dataclass(frozen=True)
class Hidden:
    """The teacher's final hidden states in bfloat16; its head, kept beside the shards, rebuilds the exact logits."""

    size: int
    """D, numbers a position."""
    name = "hidden"
    draws = 1
    uniforms = 0


AnyScheme = VarOpt | TopK | RandomDraws | Hidden

_SCHEMES: dict[str, type[AnyScheme]] = {"varopt": VarOpt, "top_k": TopK, "random": RandomDraws, "hidden": Hidden}


def make(name: str, **parameters: Any) -> AnyScheme:
    """The scheme of a name (`varopt`, `top_k`, `random`, `hidden`) with its parameters."""
    return _SCHEMES[name](**parameters)


def parameters(scheme: AnyScheme) -> dict[str, Any]:
    """What a manifest says of a scheme; `make(scheme.name, **parameters(scheme))` gives it back."""
    return asdict(scheme)


def _widened(uniform_NU: NDArray, width: int) -> NDArray:
    """At least `width` columns: those that are added lie where nothing is coded."""
    return np.pad(uniform_NU, ((0, 0), (0, max(0, width - uniform_NU.shape[1]))))[:, :width]
