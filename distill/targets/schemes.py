"""Schemes: how a distribution becomes a target. One class a scheme, found by its name.

Shapes: N positions, V vocabulary, K entries, U random numbers a position.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from distill.targets.random_draws import random_draws
from distill.targets.sparse import SparseTargets
from distill.targets.top_k import top_k
from distill.targets.varopt import varopt


@dataclass(frozen=True)
class VarOpt:
    """Threshold sampling (`distill.targets.varopt`).

    The first random number of a position draws its tail atoms; the others round its weights when they are stored.
    """

    threshold: float
    name = "varopt"

    @property
    def most_atoms(self) -> int:
        """Bound of a position's tail atoms, each of which weighs at least the threshold."""
        return int(1 / self.threshold)

    @property
    def most_entries(self) -> int:
        """Bound of a position's entries: 1 / threshold, an atom for the rest, and one more for rounding."""
        return self.most_atoms + 2

    @property
    def uniforms(self) -> int:
        """Random numbers a position (U)."""
        return 1 + self.most_entries

    def sample(self, probs_NV: Tensor, uniform_NU: Tensor) -> SparseTargets:
        """Turn distributions into targets."""
        return varopt(probs_NV, self.threshold, uniform_NU[:, 0])


@dataclass(frozen=True)
class TopK:
    """The `entries` largest probabilities and one bucket for the rest (`distill.targets.top_k`).

    All random numbers of a position round its weights when they are stored.
    """

    entries: int
    name = "top_k"

    @property
    def most_entries(self) -> int:
        """Bound of a position's entries."""
        return self.entries

    @property
    def uniforms(self) -> int:
        """Random numbers a position (U): one for each weight, and one for the rest."""
        return self.entries + 1

    def sample(self, probs_NV: Tensor, uniform_NU: Tensor) -> SparseTargets:
        """Turn distributions into targets."""
        return top_k(probs_NV, self.entries)


@dataclass(frozen=True)
class RandomDraws:
    """`entries` draws with replacement (`distill.targets.random_draws`)."""

    entries: int
    name = "random"

    @property
    def most_entries(self) -> int:
        """Bound of a position's entries."""
        return self.entries

    @property
    def uniforms(self) -> int:
        """Random numbers a position (U): one a draw."""
        return self.entries

    def sample(self, probs_NV: Tensor, uniform_NU: Tensor) -> SparseTargets:
        """Turn distributions into targets."""
        return random_draws(probs_NV, uniform_NU)


@dataclass(frozen=True)
class Hidden:
    """The teacher's final hidden states in bfloat16; its head, kept beside the shards, rebuilds the exact logits."""

    size: int
    """D, numbers a position."""
    name = "hidden"
    most_entries = 0
    uniforms = 0


SparseScheme = VarOpt | TopK | RandomDraws
AnyScheme = SparseScheme | Hidden

_SCHEMES: dict[str, type[AnyScheme]] = {"varopt": VarOpt, "top_k": TopK, "random": RandomDraws, "hidden": Hidden}


def make(name: str, **parameters: Any) -> AnyScheme:
    """Make the scheme of a name (`varopt`, `top_k`, `random`, `hidden`) with its parameters."""
    return _SCHEMES[name](**parameters)


def parameters(scheme: AnyScheme) -> dict[str, Any]:
    """Return the parameters of a scheme in a manifest; `make(scheme.name, **parameters(scheme))` gives it back."""
    return asdict(scheme)
