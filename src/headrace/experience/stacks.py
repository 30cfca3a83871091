"""Which single frames make a stack."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def stack_index(
    row: NDArray[np.int64], reset: NDArray[np.bool_], *, depth: int, zero_row: int
) -> NDArray[np.int64]:
    """Returns which rows [U, B, K] make the stacks, oldest first.

    Args:
        row: [K - 1 + U, B] where each single frame lies, from K - 1 before the first row on.
        reset: The same shape: an episode began with this frame.
        depth: K.
        zero_row: Where the frame of zeros lies.
    """
    rows = len(row) - depth + 1
    index = np.stack([row[back : back + rows] for back in range(depth)], axis=-1)
    hidden = np.zeros((rows, row.shape[1]), np.bool_)
    for column in range(depth - 1, 0, -1):
        # What is older than the start of an episode belongs to the one before.
        hidden |= reset[column : column + rows]
        index[..., column - 1][hidden] = zero_row
    return index
