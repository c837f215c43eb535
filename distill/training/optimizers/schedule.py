"""The learning rate over a training: warm-up, then a cosine or stable and decay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Learning rate at step s of `total`, as a share of the peak.

    `cosine` rises linearly over the warm-up, then falls along half a cosine to `final`. `wsd` (warm-up-stable-decay,
    Hu et al. 2024, "MiniCPM") rises, stays, then falls linearly to `final` over the last `decay_fraction`.
    """

    kind: Literal["cosine", "wsd"]
    total: int
    warmup_fraction: float
    decay_fraction: float
    final: float

    def __call__(self, step: int) -> float:
        warmup = round(self.total * self.warmup_fraction)
        if step < warmup:
            return (step + 1) / warmup
        if self.kind == "cosine":
            done = (step - warmup) / max(self.total - warmup, 1)
            return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(done, 1)))
        decay = round(self.total * self.decay_fraction)
        done = (step - (self.total - decay)) / max(decay, 1)
        return 1 - (1 - self.final) * min(max(done, 0), 1)
