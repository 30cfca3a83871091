"""Recall: a cue is shown once, and asked for later. Without recurrent state one can only guess.

In the manner of bsuite's "Memory length" (Osband et al., arXiv:1908.03568). The best return is 1.0;
guessing gets 2 / num_cues - 1 on average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from headrace.envs import toys
from headrace.envs.toys import Array, Arrays, Moved, State
from headrace.errors import ConfigError
from headrace.specs import EnvSpec

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
    """The rules; a cue depends only on seed, copy and number of the episode."""

    truncates = False

    def __init__(self, xp: Arrays, *, delay_steps: int, num_cues: int) -> None:
        self.xp = xp
        self._question_at = delay_steps + 1
        self._num_cues = num_cues
        # All that is ever shown: each cue as one-hot, a 1 in the last place at the question, zeros.
        self._shown = xp.table(np.eye(num_cues + 2, num_cues + 1, dtype=np.float32))

    def start(self, key: Array, episode: Array) -> State:
        """Draws the cue."""
        cue = self.xp.draw(key, episode, self._num_cues)
        return {"steps": self.xp.zeros_like(episode), "cue": cue}

    def step(self, state: State, action: Array) -> Moved:
        """Takes the action for an answer where the question was shown, and ignores it elsewhere."""
        where = self.xp.where
        terminated = state["steps"] == self._question_at
        right = action == state["cue"]
        return Moved(
            state={**state, "steps": state["steps"] + 1},
            reward=where(terminated, where(right, 1.0, -1.0), 0.0),
            terminated=terminated,
            truncated=self.xp.zeros_like(terminated),
        )

    def observe(self, state: State) -> Array:
        """Shows the cue at the first step, the question at the last, and nothing between."""
        where, steps = self.xp.where, state["steps"]
        later = where(steps == self._question_at, self._num_cues, self._num_cues + 1)
        return self.xp.take(self._shown, where(steps == 0, state["cue"], later))


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

    def rules(self, config: RecallConfig, xp: Arrays) -> Recall:
        """Returns the rules over `xp`."""
        return Recall(xp, delay_steps=config.delay_steps, num_cues=config.num_cues)

    make = toys.make
    make_device = toys.make_device
    make_view = toys.make_view


RECALL = RecallFamily()
