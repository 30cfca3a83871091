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

from headrace.envs import toys
from headrace.envs.toys import Array, Arrays, Moved, State
from headrace.errors import ConfigError
from headrace.specs import EnvSpec

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
    """The rules; where a point starts depends only on seed, copy and number of the episode."""

    truncates = True

    def __init__(self, xp: Arrays, *, episode_steps: int) -> None:
        self.xp = xp
        self._episode_steps = episode_steps
        places = 2.0 * np.arange(START_PLACES) / (START_PLACES - 1) - 1.0
        self._places = xp.table(places.astype(np.float32))

    def start(self, key: Array, episode: Array) -> State:
        """The point is anywhere."""
        drawn = [self.xp.draw(key, 2 * episode + axis, START_PLACES) for axis in range(2)]
        places = [self.xp.take(self._places, place) for place in drawn]
        return {"steps": self.xp.zeros_like(episode), "position": self.xp.stack(places, 1)}

    def step(self, state: State, action: Array) -> Moved:
        """Moves the points by actions [N, 2] within [-1, 1]."""
        position = self.xp.clip(state["position"] + STEP * action, -1.0, 1.0)
        steps = state["steps"] + 1
        truncated = steps >= self._episode_steps
        return Moved(
            state={**state, "position": position, "steps": steps},
            reward=-STEP * self.xp.sqrt((position**2).sum(axis=-1)),
            terminated=self.xp.zeros_like(truncated),
            truncated=truncated,
        )

    def observe(self, state: State) -> Array:
        """Shows where the points are."""
        return self.xp.copy(state["position"])


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

    def rules(self, config: PointMassConfig, xp: Arrays) -> PointMass:
        """Returns the rules over `xp`."""
        return PointMass(xp, episode_steps=config.episode_steps)

    make = toys.make
    make_device = toys.make_device
    make_view = toys.make_view


POINTMASS = PointMassFamily()
