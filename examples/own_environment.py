"""An environment of your own: any class or function that returns a gymnasium.Env.

    headrace train own_environment:Stairs --total-frames 60000
    headrace eval runs/… --trust-code

Worker processes import this file too, so what it does on import, each of them does. What a worker
prints, or dies of, is shown with the number of the environment.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

STEPS = 4


class Stairs(gym.Env[dict[str, Any], np.int64]):
    """Climb the stairs by the foot that is shown; with the wrong one you fall back to the ground.

    The observation is a Dict, `info["action_mask"]` forbids standing still at the bottom, and what
    the last `info` has in numbers is logged: here as `episode/falls`.
    """

    def __init__(self, max_steps: int = 40) -> None:
        self.observation_space = gym.spaces.Dict(
            {
                "foot": gym.spaces.Discrete(2),
                "height": gym.spaces.Box(0.0, 1.0, (1,), np.float64),
            }
        )
        self.action_space = gym.spaces.Discrete(3)  # left, right, rest
        self._max_steps = max_steps

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Starts at the bottom."""
        super().reset(seed=seed)
        self._height = self._steps = self._falls = 0
        self._foot = int(self.np_random.integers(2))
        return self._observation(), {"action_mask": self._mask()}

    def step(self, action: np.int64) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Moves; the reward is 1 at the top."""
        self._steps += 1
        if action == self._foot:
            self._height += 1
        elif action != 2:
            self._falls += self._height > 0
            self._height = 0
        self._foot = int(self.np_random.integers(2))
        at_top = self._height == STEPS
        info = {"action_mask": self._mask(), "falls": self._falls}
        out_of_time = self._steps >= self._max_steps
        return self._observation(), float(at_top), at_top, out_of_time, info

    def _observation(self) -> dict[str, Any]:
        return {"foot": self._foot, "height": np.array([self._height / STEPS])}

    def _mask(self) -> NDArray[np.int8]:
        return np.array([1, 1, self._height > 0], np.int8)
