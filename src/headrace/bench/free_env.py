"""An environment that costs what it is told and nothing else. Imported by worker processes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

EPISODE_STEPS = 500


class FreeEnv(gym.Env[NDArray[Any], np.int64]):
    """Four numbers, or a frame, that never change, two actions, an episode of 500 steps."""

    def __init__(self, cost_us: float = 0.0, frame_shape: Sequence[int] = ()) -> None:
        """Makes one.

        Args:
            cost_us: Microseconds of a processor's time that a `step` takes.
            frame_shape: Of a frame of bytes, which is noise; empty for four numbers.
        """
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)
        self._observation: NDArray[Any] = np.zeros(4, np.float32)
        if frame_shape:
            self.observation_space = gym.spaces.Box(0, 255, tuple(frame_shape), np.uint8)
            rng = np.random.default_rng(0)
            self._observation = rng.integers(0, 256, tuple(frame_shape), np.uint8)
        self.action_space = gym.spaces.Discrete(2)
        self._cost_s = cost_us / 1e6
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Starts an episode."""
        self._steps = 0
        return self._observation, {}

    def step(self, action: np.int64) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        """Uses up its time; the reward is 0."""
        if self._cost_s:
            end_s = time.perf_counter() + self._cost_s
            while time.perf_counter() < end_s:
                pass
        self._steps += 1
        return self._observation, 0.0, False, self._steps == EPISODE_STEPS, {}
