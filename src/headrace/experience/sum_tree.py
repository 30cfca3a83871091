"""Draws in proportion to priorities, at a cost that grows like the log of how many there are.

A tree of sums with 32 children a node, one array per level, so that a batch costs a few array
operations a level whatever its size: 3 levels up to 32 768 leaves, 4 up to a million. (Of 8, 16,
32, 64 and 128 children, 32 was fastest or next to it from 1e4 to 1e6 leaves.)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FAN_OUT = 32


def _level_sizes(capacity: int) -> list[int]:
    """Number of nodes of each level, the root first; every node has FAN_OUT children."""
    sizes = [-(-capacity // FAN_OUT)]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // FAN_OUT))
    return sizes[::-1]


class SumTree:
    """Priorities, float64 and at least 0, of a fixed number of leaves; all start at 0."""

    def __init__(self, capacity: int) -> None:
        # levels[d][i] are the priorities, or sums, of the children of node i at depth d.
        self._levels = [np.zeros((size, FAN_OUT)) for size in _level_sizes(capacity)]
        self._leaves = self._levels[-1].reshape(-1)

    @staticmethod
    def required_nbytes(capacity: int) -> int:
        """Bytes that a tree of so many leaves takes."""
        return 8 * FAN_OUT * sum(_level_sizes(capacity))

    @property
    def total(self) -> float:
        """Sum of all priorities."""
        return float(self._levels[0].sum())

    @property
    def nbytes(self) -> int:
        """Bytes that this tree takes."""
        return sum(level.nbytes for level in self._levels)

    def get(self, index: NDArray[np.int64]) -> NDArray[np.float64]:
        """Returns the priorities of leaves [n]."""
        return self._leaves[index]

    def set(self, index: NDArray[np.int64], priority: NDArray[np.float64] | float) -> None:
        """Sets the priorities of leaves [n]; of a leaf that is named twice, the last one stays.

        Sums are made anew from what they add up, so that no rounding error ever piles up.
        """
        self._leaves[index] = priority
        node = index
        for depth in range(len(self._levels) - 1, 0, -1):
            node = node // FAN_OUT
            sums = np.add.reduce(self._levels[depth][node], axis=1)
            self._levels[depth - 1].reshape(-1)[node] = sums

    def sample(self, uniform: NDArray[np.float64]) -> NDArray[np.int64]:
        """Returns the leaf [B] at each share [B] of the total, in [0, 1); one must be above 0."""
        batch = np.arange(len(uniform))
        node = np.zeros(len(uniform), np.int64)
        target = uniform * self.total
        for level in self._levels:
            sums = np.cumsum(level[node], axis=1)
            # Sums in another order round to other numbers. Kept below the last of these, the target
            # lies in [sums[child - 1], sums[child]) of some child: an interval that is not empty,
            # so its priority is not 0, and the same holds among its own children.
            target = np.minimum(target, np.nextafter(sums[:, -1], 0.0))
            child = (sums <= target[:, None]).sum(axis=1)
            target -= np.where(child > 0, sums[batch, child - 1], 0.0)
            node = node * FAN_OUT + child
        return node

    def state(self) -> NDArray[np.float64]:
        """Returns the priorities of all leaves, and of those that pad the last node."""
        return self._leaves

    def restore(self, state: NDArray[np.float64]) -> None:
        """Puts back what `state` gave."""
        self.set(np.arange(len(self._leaves)), state)
