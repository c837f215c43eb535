"""The random numbers of a sample: a function of the cache's seed and the sample's content alone."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def sample_uniforms(
    seed: int, input_ids_L: NDArray[np.integer], position_ids_L: NDArray[np.integer], columns: int
) -> NDArray[np.float64]:
    """Return `[L, columns]` numbers in [0, 1) for the positions of one sample.

    Philox, a counter-based generator, is keyed with a hash of seed, ids and positions: the same sample gets the same
    numbers whatever the batch, the process or the restart.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(seed.to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(input_ids_L, dtype="<u4").tobytes())
    digest.update(np.ascontiguousarray(position_ids_L, dtype="<u4").tobytes())
    key = np.frombuffer(digest.digest(), dtype="<u8")
    return np.random.Generator(np.random.Philox(key=key)).random((len(input_ids_L), columns))
