"""A clock that cuts episodes of which every step costs 1, and an action that is never allowed."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

LENGTH = 2


class Clock(gym.Env[Any, Any]):
    """Always the same observation; without the clock it would go on for ever."""

    observation_space = gym.spaces.Box(0.0, 1.0, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def _shown(self) -> tuple[Any, dict[str, Any]]:
        return np.ones(1, np.float32), {"action_mask": np.array([True, False])}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self._steps = 0
        return self._shown()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        observation, info = self._shown()
        return observation, -1.0, False, self._steps == LENGTH, info
