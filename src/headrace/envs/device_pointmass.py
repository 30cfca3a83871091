"""PointMass in torch: the task of `envs.pointmass`, with its rules, seeds and random streams."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.envs.device import Moved, State, device_draw, device_keys
from headrace.envs.pointmass import START_PLACES, STEP
from headrace.specs import EnvSpec


class DevicePointMass:
    """N points; see `envs.pointmass.PointMass`, which shows the same, and `DeviceEnv`."""

    truncates = True

    def __init__(
        self,
        spec: EnvSpec,
        *,
        num_envs: int,
        episode_steps: int,
        seed: int,
        first_env: int = 0,
        device: str = "cpu",
    ) -> None:
        self.spec = spec
        self.num_envs = num_envs
        self._episode_steps = episode_steps
        self._key = device_keys(seed, num_envs=num_envs, first_env=first_env, device=device)

    def begin(self) -> State:
        """Starts the first episode of every point."""
        zero = torch.zeros_like(self._key)
        return {
            "key": self._key.clone(),
            "episode": zero,
            "steps": zero.clone(),
            "position": _start(self._key, zero),
        }

    def step(self, state: State, action: Tensor) -> Moved:
        """Moves the points by actions [N, 2] within [-1, 1]."""
        position = (state["position"] + STEP * action).clamp(-1.0, 1.0)
        steps = state["steps"] + 1
        truncated = steps >= self._episode_steps
        # In float64, since not every float32 root is rounded as numpy's is.
        distance = position.square().sum(dim=-1).double().sqrt().float()
        return Moved(
            state={**state, "position": position, "steps": steps},
            reward=-STEP * distance,
            terminated=torch.zeros_like(truncated),
            truncated=truncated,
        )

    def restart(self, state: State, ended: Tensor) -> State:
        """Draws where the next episode starts."""
        episode = state["episode"] + ended
        start = _start(state["key"], episode)
        return {
            "key": state["key"],
            "episode": episode,
            "steps": state["steps"].masked_fill(ended, 0),
            "position": torch.where(ended.unsqueeze(1), start, state["position"]),
        }

    def observe(self, state: State) -> Tensor:
        """Shows where the points are."""
        # A copy: whoever keeps what is shown must not keep the state.
        return state["position"].clone()


def _start(key: Tensor, episode: Tensor) -> Tensor:
    """Places [N, 2] where episodes start; in float64 until the end, as the numpy one is."""
    axes = [device_draw(key, 2 * episode + axis, START_PLACES) for axis in range(2)]
    return (2.0 * torch.stack(axes, dim=1).double() / (START_PLACES - 1) - 1.0).float()
