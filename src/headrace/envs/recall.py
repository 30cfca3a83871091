"""Recall: a cue is shown once, and asked for later. Without recurrent state one can only guess.

In the manner of bsuite's "Memory length" (Osband et al., arXiv:1908.03568). The best return is 1.0;
guessing gets 2 / num_cues - 1 on average.
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

BEST_RETURN = 1.0
"""Return of an episode where the answer was the cue."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallConfig:
    """Settings of Recall."""

    delay_steps: int = 10
    """Puts so many blank agent steps between cue and question; an episode takes two more."""
    num_cues: int = 2
    """Draws from so many different cues, and takes as many actions."""

    def __post_init__(self) -> None:
        if self.delay_steps < 0:
            raise ConfigError(f"delay_steps must be at least 0, not {self.delay_steps}")
        if self.num_cues < 2:
            raise ConfigError(f"num_cues must be at least 2, not {self.num_cues}")


class Recall:
    """N copies; a cue depends only on seed, copy and number of the episode."""

    def __init__(
        self, spec: EnvSpec, *, num_envs: int, delay_steps: int, seed: int, first_env: int = 0
    ) -> None:
        self.spec = spec
        self.num_envs = num_envs
        self._question_at = delay_steps + 1
        self._num_cues = spec.num_actions
        self._key = stream_keys(seed, first_env + num_envs)[first_env:]
        self._episode = np.full(num_envs, -1, dtype=np.int64)
        self._steps = np.zeros(num_envs, dtype=np.int64)
        self._cue = np.zeros(num_envs, dtype=np.int64)

    def reset(self) -> EnvStep:
        """Starts a new episode in every copy."""
        env_id = np.arange(self.num_envs, dtype=np.int32)
        self._begin(env_id)
        return first_rows(self._show(env_id))

    def step(self, env_id: NDArray[np.int32], action: NDArray[np.int64]) -> EnvStep:
        """Takes the action for an answer where the question was shown, and ignores it elsewhere."""
        terminated = self._steps[env_id] == self._question_at
        right = action == self._cue[env_id]
        self._steps[env_id] += 1
        observation, final_observation = self._show(env_id), None
        if terminated.any():
            final_observation = observation.copy()
            self._begin(env_id[terminated])
            observation[terminated] = self._show(env_id[terminated])
        return EnvStep(
            env_id=env_id,
            run_id=np.zeros(len(env_id), dtype=np.int64),
            observation=observation,
            reward=np.where(terminated, np.where(right, 1, -1), 0).astype(np.float32),
            reset=terminated.copy(),
            terminated=terminated,
            truncated=np.zeros(len(env_id), dtype=np.bool_),
            final_observation=final_observation,
        )

    def snapshot(self) -> dict[str, NDArray[np.generic]]:
        """Returns cues, clocks and random streams."""
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
            "cue": self._cue,
        }

    def _begin(self, env_id: NDArray[np.int32]) -> None:
        self._episode[env_id] += 1
        self._steps[env_id] = 0
        self._cue[env_id] = draw(self._key[env_id], self._episode[env_id], self._num_cues)

    def _show(self, env_id: NDArray[np.int32]) -> NDArray[np.float32]:
        """Cue as one-hot at the first step, a 1 in the last place at the question, else zeros."""
        shown = np.zeros((len(env_id), self._num_cues + 1), dtype=np.float32)
        first = np.flatnonzero(self._steps[env_id] == 0)
        shown[first, self._cue[env_id[first]]] = 1.0
        shown[self._steps[env_id] == self._question_at, -1] = 1.0
        return shown


class RecallFamily:
    """The one environment named recall."""

    config_type: type[Any] = RecallConfig
    pool = "inline"

    def spec(self, name: str, config: RecallConfig) -> EnvSpec:
        """Returns the spec; nothing is started."""
        if name != "recall":
            raise ConfigError(f"no environment named {name!r}; did you mean 'recall'?")
        shown = gym.spaces.Box(0.0, 1.0, (config.num_cues + 1,), np.float32)
        answers = gym.spaces.Discrete(config.num_cues)
        return EnvSpec(name=name, observation_space=shown, action_space=answers)

    def evaluation(self, config: RecallConfig) -> RecallConfig:
        """Judges under the settings of training."""
        return config

    def make(
        self,
        name: str,
        config: RecallConfig,
        *,
        num_envs: int,
        batch_size: int,
        threads: int,
        seed: int,
        first_env: int = 0,
    ) -> Recall:
        """Starts `num_envs` copies; the pool cuts batches, and steps them in its own thread."""
        spec = self.spec(name, config)
        return Recall(
            spec, num_envs=num_envs, delay_steps=config.delay_steps, seed=seed, first_env=first_env
        )

    def make_view(self, name: str, config: RecallConfig, *, seed: int) -> None:
        """A person sees what the agent sees."""


RECALL = RecallFamily()
