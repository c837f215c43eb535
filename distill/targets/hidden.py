"""The exact form of targets: the teacher's final hidden states, from which its head makes the distributions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class HiddenTargets:
    """Final hidden states of N positions (scheme `hidden`)."""

    hidden_ND: Tensor
    """bfloat16."""

    def __getitem__(self, rows: slice) -> HiddenTargets:
        """Return the states of some positions."""
        return HiddenTargets(self.hidden_ND[rows])
