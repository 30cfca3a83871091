"""Catch: a ball falls, a paddle must be under it. The smallest game that an agent can fail.

As in bsuite (Osband et al., arXiv:1908.03568, "Catch"): a board of 10 x 5, three actions, one
reward at the end, +1 or -1. The best return is 1.0.
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
    """The rules; where a ball starts depends only on seed, board and number of the episode."""

    def __init__(self, xp: Arrays, *, truncate_after: int) -> None:
        self.xp = xp
        # In the last row the ball ends the game, not the clock.
        self.truncates = 0 < truncate_after < ROWS - 1
        # The ball falls one row a step, so its row is the number of steps made; it never has ROWS.
        self._truncated_at = truncate_after or ROWS
        # Every board there can be: looking one up costs half of what drawing it does.
        cells = np.arange(ROWS * COLUMNS)
        boards = np.zeros((ROWS * COLUMNS, COLUMNS, ROWS * COLUMNS), dtype=np.float32)
        boards[cells, :, cells] = 1.0
        paddles = np.arange(COLUMNS)
        boards[:, paddles, (ROWS - 1) * COLUMNS + paddles] = 1.0
        self._boards = xp.table(boards.reshape(-1, ROWS * COLUMNS))

    def start(self, key: Array, episode: Array) -> State:
        """The ball is in the first row, the paddle in the middle."""
        zero = self.xp.zeros_like(episode)
        return {
            "ball_row": zero,
            "ball_column": self.xp.draw(key, episode, COLUMNS),
            "paddle": zero + COLUMNS // 2,
        }

    def step(self, state: State, action: Array) -> Moved:
        """Moves paddles (0 left, 1 stay, 2 right), then balls, one cell each."""
        where = self.xp.where
        paddle = self.xp.clip(state["paddle"] + action - 1, 0, COLUMNS - 1)
        ball_row = state["ball_row"] + 1
        terminated = ball_row == ROWS - 1
        caught = paddle == state["ball_column"]
        return Moved(
            state={**state, "paddle": paddle, "ball_row": ball_row},
            reward=where(terminated, where(caught, 1.0, -1.0), 0.0),
            terminated=terminated,
            truncated=ball_row >= self._truncated_at,
        )

    def observe(self, state: State) -> Array:
        """Draws the boards."""
        cell = state["ball_row"] * COLUMNS + state["ball_column"]
        boards = self.xp.take(self._boards, cell * COLUMNS + state["paddle"])
        return boards.reshape(-1, ROWS, COLUMNS)


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

    def rules(self, config: CatchConfig, xp: Arrays) -> Catch:
        """Returns the rules over `xp`."""
        return Catch(xp, truncate_after=config.truncate_after)

    make = toys.make
    make_device = toys.make_device
    make_view = toys.make_view


CATCH = CatchFamily()
