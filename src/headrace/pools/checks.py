"""What every pool refuses before an action leaves the server."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from headrace.errors import ConfigError
from headrace.specs import ActionSpace


def check_batch(batch_size: int, num_envs: int, *, full: bool = False) -> None:
    """Refuses batches that no pool of `num_envs` environments can give.

    Raises:
        ConfigError: none or more than there are; or, where all are given at once, not all.
    """
    if not 1 <= batch_size <= num_envs:
        raise ConfigError(f"batch_size must be in [1, num_envs={num_envs}], not {batch_size}")
    if full and batch_size != num_envs:
        raise ConfigError(f"full batches need batch_size = num_envs = {num_envs}")


def check_action(action: NDArray[Any], rows: int, space: ActionSpace) -> None:
    """Refuses what no environment can take; ALE waits for ever on an action outside the space.

    Args:
        action: the reply: int64 [N] for Discrete, int64 [N, D] for MultiDiscrete, float32 [N, D]
            for Box.
        rows: N, rows of the last `receive`.
        space: of one action.

    Raises:
        ValueError: wrong count, wrong dtype, or an action outside the space.
    """
    dtype = np.float32 if isinstance(space, gym.spaces.Box) else np.int64
    shape = (rows, *(space.shape or ()))
    if action.shape != shape or action.dtype != dtype:
        raise ValueError(
            f"expected {rows} actions of {np.dtype(dtype)} {shape}, got {action.dtype} "
            f"{action.shape}"
        )
    low, high = _bounds(space)
    if not ((action >= low) & (action <= high)).all():  # so that NaN is outside
        raise ValueError(
            f"actions must be in {low}..{high}, got {action.min(axis=0)}..{action.max(axis=0)}"
        )


def _bounds(space: ActionSpace) -> tuple[Any, Any]:
    if isinstance(space, gym.spaces.Box):
        return space.low, space.high
    return 0, (space.n if isinstance(space, gym.spaces.Discrete) else space.nvec) - 1
