"""One seed for every source of random numbers that a model's code may draw from."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Make the draws of torch, numpy and Python's `random` from here on a function of `seed`."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
