"""Random numbers as a function of who asks and how often: only a count must be saved.

SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014,
with the constants of Stafford's variant 13.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def stream_keys(seed: int, num_envs: int) -> NDArray[np.uint64]:
    """One key per environment; the first k keys do not depend on `num_envs`."""
    return np.random.SeedSequence(seed).generate_state(num_envs, np.uint64).astype(np.uint64)


def draw(key: NDArray[np.uint64], count: NDArray[np.int64], num_values: int) -> NDArray[np.int64]:
    """Returns draw number `count` of each stream, uniform on 0 .. num_values - 1."""
    # Wrap-around is the point of the mixer; arrays do it without a warning, scalars do not.
    word = key + (count.astype(np.uint64) + np.uint64(1)) * GAMMA
    word = (word ^ (word >> np.uint64(30))) * MIX[0]
    word = (word ^ (word >> np.uint64(27))) * MIX[1]
    word ^= word >> np.uint64(31)
    value: NDArray[np.int64] = (word % np.uint64(num_values)).astype(np.int64)
    return value
