"""Catch: a ball falls, a paddle must be under it. The smallest game that an agent can fail.

As in bsuite (Osband et al., arXiv:1908.03568, "Catch"): a board of 10 x 5, three actions, one
reward at the end, +1 or -1. The best return is 1.0.
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

ROWS = 10
COLUMNS = 5
BEST_RETURN = 1.0
"""Return of an episode where the ball is caught."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CatchConfig:
    """Settings of Catch."""

    truncate_after: int = 0
    """Truncates an episode after so many agent steps; 0 never does. A whole episode takes 9."""

    def __post_init__(self) -> None:
        if self.truncate_after < 0:
            raise ConfigError(f"truncate_after must be at least 0, not {self.truncate_after}")


class Catch:
    """N boards; where a ball starts depends only on seed, board and number of the episode."""

    def __init__(
        self, spec: EnvSpec, *, num_envs: int, truncate_after: int, seed: int, first_env: int = 0
    ) -> None:
        self.spec = spec
        self.num_envs = num_envs
        self._truncate_after = truncate_after
        self._key = stream_keys(seed, first_env + num_envs)[first_env:]
        self._episode = np.full(num_envs, -1, dtype=np.int64)
        self._ball_row = np.zeros(num_envs, dtype=np.int64)
        self._ball_column = np.zeros(num_envs, dtype=np.int64)
        self._paddle = np.zeros(num_envs, dtype=np.int64)

    def reset(self) -> EnvStep:
        """Starts a new episode on every board."""
        env_id = np.arange(self.num_envs, dtype=np.int32)
        self._begin(env_id)
        return first_rows(self._draw_boards(env_id))

    def step(self, env_id: NDArray[np.int32], action: NDArray[np.int64]) -> EnvStep:
        """Moves paddles (0 left, 1 stay, 2 right), then balls, one cell each."""
        self._paddle[env_id] = np.clip(self._paddle[env_id] + action - 1, 0, COLUMNS - 1)
        self._ball_row[env_id] += 1
        terminated = self._ball_row[env_id] == ROWS - 1
        caught = self._paddle[env_id] == self._ball_column[env_id]
        truncated = self._out_of_time(env_id) & ~terminated
        ended = terminated | truncated
        observation, final_observation = self._draw_boards(env_id), None
        if ended.any():
            final_observation = observation.copy()
            self._begin(env_id[ended])
            observation[ended] = self._draw_boards(env_id[ended])
        return EnvStep(
            env_id=env_id,
            run_id=np.zeros(len(env_id), dtype=np.int64),
            observation=observation,
            reward=np.where(terminated, np.where(caught, 1, -1), 0).astype(np.float32),
            reset=ended,
            terminated=terminated,
            truncated=truncated,
            final_observation=final_observation,
        )

    def snapshot(self) -> dict[str, NDArray[np.generic]]:
        """Returns boards and random streams."""
        return {name: value.copy() for name, value in self._state().items()}

    def restore(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Puts back what `snapshot` gave."""
        for name, value in self._state().items():
            value[:] = state[name]

    def _state(self) -> dict[str, NDArray[np.generic]]:
        return {
            "key": self._key,
            "episode": self._episode,
            "ball_row": self._ball_row,
            "ball_column": self._ball_column,
            "paddle": self._paddle,
        }

    def _begin(self, env_id: NDArray[np.int32]) -> None:
        self._episode[env_id] += 1
        self._ball_row[env_id] = 0
        self._ball_column[env_id] = draw(self._key[env_id], self._episode[env_id], COLUMNS)
        self._paddle[env_id] = COLUMNS // 2

    def _out_of_time(self, env_id: NDArray[np.int32]) -> NDArray[np.bool_]:
        if not self._truncate_after:
            return np.zeros(len(env_id), dtype=np.bool_)
        # The ball falls one row a step, so its row is the number of steps made.
        return self._ball_row[env_id] >= self._truncate_after

    def _draw_boards(self, env_id: NDArray[np.int32]) -> NDArray[np.float32]:
        boards = np.zeros((len(env_id), ROWS, COLUMNS), dtype=np.float32)
        board = np.arange(len(env_id))
        boards[board, self._ball_row[env_id], self._ball_column[env_id]] = 1.0
        boards[board, ROWS - 1, self._paddle[env_id]] = 1.0
        return boards


class CatchFamily:
    """The one environment named catch."""

    config_type: type[Any] = CatchConfig
    pool = "inline"

    def spec(self, name: str, config: CatchConfig) -> EnvSpec:
        """Returns the spec; nothing is started."""
        if name != "catch":
            raise ConfigError(f"no environment named {name!r}; did you mean 'catch'?")
        board = gym.spaces.Box(0.0, 1.0, (ROWS, COLUMNS), np.float32)
        return EnvSpec(name=name, observation_space=board, action_space=gym.spaces.Discrete(3))

    def evaluation(self, config: CatchConfig) -> CatchConfig:
        """Judges whole episodes: a return that is cut short says nothing."""
        return CatchConfig()

    def make(
        self,
        name: str,
        config: CatchConfig,
        *,
        num_envs: int,
        batch_size: int,
        threads: int,
        seed: int,
        first_env: int = 0,
    ) -> Catch:
        """Starts `num_envs` boards; the pool cuts batches, and steps them in its own thread."""
        spec = self.spec(name, config)
        return Catch(
            spec,
            num_envs=num_envs,
            truncate_after=config.truncate_after,
            seed=seed,
            first_env=first_env,
        )

    def make_device(
        self,
        name: str,
        config: CatchConfig,
        *,
        num_envs: int,
        seed: int,
        first_env: int = 0,
        device: str = "cpu",
    ) -> Any:
        """Makes the same boards in torch: an `envs.device.DeviceEnv`."""
        # Here: workers step the numpy one, and need no torch.
        from headrace.envs.device_catch import DeviceCatch  # noqa: PLC0415

        return DeviceCatch(
            self.spec(name, config),
            num_envs=num_envs,
            truncate_after=config.truncate_after,
            seed=seed,
            first_env=first_env,
            device=device,
        )

    def make_view(self, name: str, config: CatchConfig, *, seed: int) -> None:
        """A person sees what the agent sees."""


CATCH = CatchFamily()
