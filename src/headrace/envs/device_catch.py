"""Catch in torch: the game of `envs.catch`, with its rules, seeds and random streams."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.envs.catch import COLUMNS, ROWS
from headrace.envs.device import Moved, State, device_draw, device_keys
from headrace.specs import EnvSpec


class DeviceCatch:
    """N boards; see `envs.catch.Catch`, which shows the same, and `envs.device.DeviceEnv`."""

    def __init__(
        self,
        spec: EnvSpec,
        *,
        num_envs: int,
        truncate_after: int,
        seed: int,
        first_env: int = 0,
        device: str = "cpu",
    ) -> None:
        self.spec = spec
        self.num_envs = num_envs
        # In the last row the ball ends the game, not the clock.
        self.truncates = 0 < truncate_after < ROWS - 1
        self._truncate_after = truncate_after
        self._key = device_keys(seed, num_envs=num_envs, first_env=first_env, device=device)
        # Every board there can be: looking one up costs half of what drawing it does.
        cells = torch.arange(ROWS * COLUMNS)
        boards = torch.zeros(ROWS * COLUMNS, COLUMNS, ROWS * COLUMNS)
        boards[cells, :, cells] = 1.0
        paddles = torch.arange(COLUMNS)
        boards[:, paddles, (ROWS - 1) * COLUMNS + paddles] = 1.0
        self._boards = boards.flatten(0, 1).to(device)

    def begin(self) -> State:
        """Starts the first episode on every board."""
        zero = torch.zeros_like(self._key)
        return {
            "key": self._key.clone(),
            "episode": zero,
            "ball_row": zero.clone(),
            "ball_column": device_draw(self._key, zero, COLUMNS),
            "paddle": zero + COLUMNS // 2,
        }

    def step(self, state: State, action: Tensor) -> Moved:
        """Moves paddles (0 left, 1 stay, 2 right), then balls, one cell each."""
        paddle = (state["paddle"] + action - 1).clamp(0, COLUMNS - 1)
        ball_row = state["ball_row"] + 1
        terminated = ball_row == ROWS - 1
        caught = paddle == state["ball_column"]
        truncated = torch.zeros_like(terminated)
        if self._truncate_after:
            # The ball falls one row a step, so its row is the number of steps made.
            truncated = ball_row >= self._truncate_after
        return Moved(
            state={**state, "paddle": paddle, "ball_row": ball_row},
            reward=torch.where(terminated, torch.where(caught, 1.0, -1.0), 0.0),
            terminated=terminated,
            truncated=truncated,
        )

    def restart(self, state: State, ended: Tensor) -> State:
        """Draws where the next ball starts."""
        episode = state["episode"] + ended
        column = device_draw(state["key"], episode, COLUMNS)
        return {
            "key": state["key"],
            "episode": episode,
            "ball_row": state["ball_row"].masked_fill(ended, 0),
            "ball_column": torch.where(ended, column, state["ball_column"]),
            "paddle": state["paddle"].masked_fill(ended, COLUMNS // 2),
        }

    def observe(self, state: State) -> Tensor:
        """Draws the boards."""
        cell = state["ball_row"] * COLUMNS + state["ball_column"]
        board = self._boards.index_select(0, cell * COLUMNS + state["paddle"])
        return board.view(-1, ROWS, COLUMNS)
