"""PointMass: push a point to the middle of a square. The smallest task with continuous actions.

The action is a velocity; a step takes `STEP` of time. The point stops at the walls. The reward is
minus the distance to the middle, once the point has moved, times the time of the step; so a return
is an integral, and values stay near 1. An episode ends by the clock alone: it is truncated, never
terminated.

Best return. No policy can have |x| below max(0, |x_0| - STEP t) after t steps, and the action
-x / STEP, cut to [-1, 1], has just that on both axes at once. The reward falls with |x| and with
|y|, so this action is best at every step, for every discount and every length of an episode, and

    best return = - STEP sum over t = 1 .. T of ||max(0, |p_0| - STEP t)||,   p_0 the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from headrace.envs.base import first_rows
from headrace.envs.draws import draw, stream_keys
from headrace.errors import ConfigError
from headrace.specs import EnvSpec
from headrace.steps import EnvStep

STEP = 0.1
"""Time of a step, so the most that it moves along an axis; the square is [-1, 1] x [-1, 1]."""
START_PLACES = 201
"""Places on each axis, 0.01 apart and equally likely, where an episode may start."""
BEST_RETURN = -0.23999
"""Mean over all starts of the best return of an episode of 50 steps."""
RANDOM_RETURN = -3.885
"""Mean return of 50 steps with actions uniform on the square, from 200 000 episodes (+- 0.003)."""


def best_return(start: NDArray[np.floating[Any]], episode_steps: int) -> NDArray[np.float64]:
    """Returns the best return [N] of episodes that start at `start` [N, 2]."""
    made = STEP * np.arange(1, episode_steps + 1)
    left = np.maximum(0.0, np.abs(start)[:, None, :] - made[None, :, None])
    best: NDArray[np.float64] = -STEP * np.sqrt((left**2).sum(axis=-1)).sum(axis=-1)
    return best


@dataclass(frozen=True, kw_only=True, slots=True)
class PointMassConfig:
    """Settings of PointMass."""

    episode_steps: int = 50
    """Truncates every episode after so many agent steps."""

    def __post_init__(self) -> None:
        if self.episode_steps < 1:
            raise ConfigError(f"episode_steps must be at least 1, not {self.episode_steps}")


class PointMass:
    """N points; where one starts depends only on seed, copy and number of the episode."""

    def __init__(
        self, spec: EnvSpec, *, num_envs: int, episode_steps: int, seed: int, first_env: int = 0
    ) -> None:
        self.spec = spec
        self.num_envs = num_envs
        self._episode_steps = episode_steps
        self._key = stream_keys(seed, first_env + num_envs)[first_env:]
        self._episode = np.full(num_envs, -1, dtype=np.int64)
        self._steps = np.zeros(num_envs, dtype=np.int64)
        self._position = np.zeros((num_envs, 2), dtype=np.float32)

    def reset(self) -> EnvStep:
        """Starts a new episode of every point."""
        env_id = np.arange(self.num_envs, dtype=np.int32)
        self._begin(env_id)
        return first_rows(self._position[env_id])

    def step(self, env_id: NDArray[np.int32], action: NDArray[np.float32]) -> EnvStep:
        """Moves the points by actions [N, 2] within [-1, 1]."""
        moved = np.clip(self._position[env_id] + np.float32(STEP) * action, -1.0, 1.0)
        self._position[env_id] = moved
        self._steps[env_id] += 1
        ended = self._steps[env_id] >= self._episode_steps
        if ended.any():
            self._begin(env_id[ended])
        return EnvStep(
            env_id=env_id,
            run_id=np.zeros(len(env_id), dtype=np.int64),
            observation=self._position[env_id],
            reward=(-STEP * np.sqrt((moved**2).sum(axis=-1))).astype(np.float32),
            reset=ended,
            terminated=np.zeros_like(ended),
            truncated=ended.copy(),
            final_observation=moved if ended.any() else None,
        )

    def snapshot(self) -> dict[str, NDArray[np.generic]]:
        """Returns points, clocks and random streams."""
        return {name: value.copy() for name, value in self._state().items()}

    def restore(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Puts back what `snapshot` gave."""
        for name, value in self._state().items():
            value[:] = state[name]

    def _state(self) -> dict[str, NDArray[np.generic]]:
        return {
            "key": self._key,
            "episode": self._episode,
            "steps": self._steps,
            "position": self._position,
        }

    def _begin(self, env_id: NDArray[np.int32]) -> None:
        self._episode[env_id] += 1
        self._steps[env_id] = 0
        for axis in range(2):
            count = 2 * self._episode[env_id] + axis
            place = draw(self._key[env_id], count, START_PLACES)
            self._position[env_id, axis] = 2.0 * place / (START_PLACES - 1) - 1.0


class PointMassFamily:
    """The one environment named pointmass."""

    config_type: type[Any] = PointMassConfig
    pool = "inline"

    def spec(self, name: str, config: PointMassConfig) -> EnvSpec:
        """Returns the spec; nothing is started."""
        if name != "pointmass":
            raise ConfigError(f"no environment named {name!r}; did you mean 'pointmass'?")
        square = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        return EnvSpec(name=name, observation_space=square, action_space=square)

    def evaluation(self, config: PointMassConfig) -> PointMassConfig:
        """Judges by the clock of training: the best return is known for every length."""
        return config

    def make(
        self,
        name: str,
        config: PointMassConfig,
        *,
        num_envs: int,
        batch_size: int,
        threads: int,
        seed: int,
        first_env: int = 0,
    ) -> PointMass:
        """Starts `num_envs` points; the pool cuts batches, and steps them in its own thread."""
        return PointMass(
            self.spec(name, config),
            num_envs=num_envs,
            episode_steps=config.episode_steps,
            seed=seed,
            first_env=first_env,
        )

    def make_device(
        self,
        name: str,
        config: PointMassConfig,
        *,
        num_envs: int,
        seed: int,
        first_env: int = 0,
        device: str = "cpu",
    ) -> Any:
        """Makes the same points in torch: an `envs.device.DeviceEnv`."""
        # Here: workers step the numpy one, and need no torch.
        from headrace.envs.device_pointmass import DevicePointMass  # noqa: PLC0415

        return DevicePointMass(
            self.spec(name, config),
            num_envs=num_envs,
            episode_steps=config.episode_steps,
            seed=seed,
            first_env=first_env,
            device=device,
        )

    def make_view(self, name: str, config: PointMassConfig, *, seed: int) -> None:
        """A person sees what the agent sees."""


POINTMASS = PointMassFamily()
