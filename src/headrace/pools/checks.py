"""What every pool refuses before an action leaves the server."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def check_action(action: NDArray[np.int64], rows: int, num_actions: int) -> None:
    """Refuses what no environment can take; ALE waits for ever on an action outside the space.

    Args:
        action: the reply.
        rows: rows of the last `receive`.
        num_actions: the space is 0 .. num_actions - 1.

    Raises:
        ValueError: wrong count, wrong dtype, or an action outside the space.
    """
    if action.shape != (rows,) or action.dtype != np.int64:
        raise ValueError(f"expected {rows} actions of int64, got {action.dtype} {action.shape}")
    if action.min() < 0 or action.max() >= num_actions:
        raise ValueError(
            f"actions must be in 0..{num_actions - 1}, got {action.min()}..{action.max()}"
        )
