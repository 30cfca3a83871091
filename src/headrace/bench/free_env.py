"""An environment that costs what it is told and nothing else. Imported by worker processes."""

from __future__ import annotations

import time
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

EPISODE_STEPS = 500


class FreeEnv(gym.Env[NDArray[np.float32], np.int64]):
    """Four numbers that never change, two actions, an episode of 500 steps."""

    def __init__(self, cost_us: float = 0.0) -> None:
        """Makes one whose `step` takes `cost_us` microseconds of a processor's time."""
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)
        self.action_space = gym.spaces.Discrete(2)
        self._cost_s = cost_us / 1e6
        self._observation = np.zeros(4, np.float32)
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Starts an episode."""
        self._steps = 0
        return self._observation, {}

    def step(
        self, action: np.int64
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Uses up its time; the reward is 0."""
        if self._cost_s:
            end_s = time.perf_counter() + self._cost_s
            while time.perf_counter() < end_s:
                pass
        self._steps += 1
        return self._observation, 0.0, False, self._steps == EPISODE_STEPS, {}
