"""Counter-based random numbers: the draw for a token depends on its sequence's seed and its position alone.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011): a random number is a hash of a counter under a
key, so there is no state to keep, send or restore. The hash is the output function of SplitMix64 (Steele et al.,
"Fast splittable pseudorandom number generators", 2014), once over the seed and once over seed and position.
"""

import numpy as np
from numpy.typing import NDArray

from manta.workers.columns import Ints

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_DRAW_BITS = 40


def uniform(seeds: NDArray[np.uint64], positions: Ints) -> NDArray[np.float64]:
    """float64 [n] in (0, 1), for seeds [n] and positions [n]. The CPU's sampler does the same by itself, row by row.

    40 bits plus a half: u is never 0, and u * total in float64 never rounds up to the total.
    """
    keys = _mix(seeds + _GOLDEN)
    hashes = _mix(keys + _GOLDEN * positions.astype(np.uint64))
    draws = (hashes >> np.uint64(64 - _DRAW_BITS)).astype(np.float64)
    return np.asarray((draws + 0.5) * 2.0**-_DRAW_BITS)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))
