"""The number of this process among several that run the same command. It imports nothing heavy."""

from __future__ import annotations

import os
import sys

_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def is_first_process() -> bool:
    """Tell whether this process has rank 0, as far as it is known before there is a Trainer."""
    lightning = sys.modules.get("lightning.pytorch.utilities.rank_zero")
    if lightning is not None:
        rank = getattr(lightning.rank_zero_only, "rank", 0)
    else:  # it will take the rank from these variables
        rank = next((int(os.environ[name]) for name in _RANKS if name in os.environ), 0)
    return rank == 0 and int(os.environ.get("NODE_RANK", "0")) == 0
