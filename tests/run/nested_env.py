"""An environment for tests of a user's own loop, found through the sys.path of the test.

It is all that is hard at once: parts of every kind, text, forbidden actions, numbers at the end.
"""

from typing import Any

import gymnasium as gym
import numpy as np

NUM_ACTIONS, LENGTH = 5, 6


class Guarded(gym.Env[Any, Any]):
    """Pays for each action what its draws say, and raises where a forbidden one is taken."""

    def __init__(self) -> None:
        self.action_space = gym.spaces.Discrete(NUM_ACTIONS)
        self.observation_space = gym.spaces.Dict(
            {
                "hint": gym.spaces.Text(9),
                "place": gym.spaces.Discrete(7, start=-3),
                "inner": gym.spaces.Tuple(
                    (
                        gym.spaces.Box(-9.0, 9.0, (NUM_ACTIONS,), np.float64),
                        gym.spaces.MultiDiscrete([2, 3], start=[4, -1]),
                        gym.spaces.Dict({"flags": gym.spaces.MultiBinary(3)}),
                    )
                ),
                "camera": gym.spaces.Box(0, 255, (4, 6), np.uint8),
            }
        )

    def _draw(self) -> tuple[dict[str, Any], dict[str, Any]]:
        rng = self.np_random
        self._pay = rng.normal(size=NUM_ACTIONS).clip(-9, 9)
        # Two of five: a policy that is not told of them soon takes a forbidden one.
        self._allowed = np.isin(np.arange(NUM_ACTIONS), rng.choice(NUM_ACTIONS, 2, replace=False))
        observation = {
            "hint": "go",
            "place": int(rng.integers(-3, 4)),
            "inner": (
                self._pay,
                rng.integers([4, -1], [6, 2]),
                {"flags": rng.integers(0, 2, 3).astype(np.int8)},
            ),
            "camera": rng.integers(0, 256, (4, 6)).astype(np.uint8),
        }
        return observation, {"action_mask": self._allowed.astype(np.int8)}

    def reset(
        self, *, seed: int | None = None, options: Any = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self._steps, self._total = 0, 0.0
        return self._draw()

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        if not self._allowed[action]:
            raise ValueError(f"action {action} is forbidden")
        reward = float(np.float32(self._pay[action]))
        self._steps += 1
        self._total += reward
        observation, info = self._draw()
        ended = self._steps == LENGTH
        if ended:
            info |= {"score": self._total, "level": "first"}
        return observation, reward, ended and bool(self._allowed[0]), ended, info


class Owned(gym.Env[Any, Any]):
    """Takes nothing but what is in its own action space; pays for the largest parts of it."""

    spaces = (
        gym.spaces.Discrete(3, start=5),
        gym.spaces.MultiDiscrete(np.array([[2, 3], [4, 2]]), start=np.array([[1, 0], [-2, 7]])),
        gym.spaces.MultiBinary((2, 2)),
        gym.spaces.Box(np.array([[-2.0, 0.0]]), np.array([[2.0, 5.0]]), dtype=np.float64),
        gym.spaces.Box(0, 6, (2,), np.int32),
    )

    def __init__(self, kind: int = 0) -> None:
        self.observation_space = gym.spaces.Box(0.0, 1.0, (1,), np.float32)
        self.action_space = self.spaces[kind]

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return np.float32([self.np_random.random()]), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.steps += 1
        shown = np.float32([self.np_random.random()])
        return shown, float(np.mean(action)), self.steps >= 5, False, {}
