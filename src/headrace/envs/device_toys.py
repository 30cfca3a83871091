"""Toys in torch: the rules of `envs.toys`, with their seeds and random streams, on a device."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.envs.device import Moved, State, device_draw, device_keys
from headrace.envs.toys import Arrays, Rules, restarted, started
from headrace.specs import EnvSpec


def torch_arrays(device: str) -> Arrays:
    """Returns torch as an array module; its tables lie on `device`."""
    return Arrays(
        where=torch.where,
        clip=torch.clip,
        # In float64, since not every float32 root is rounded as numpy's is.
        sqrt=lambda value: value.double().sqrt().float(),
        stack=torch.stack,
        zeros_like=torch.zeros_like,
        copy=torch.clone,
        take=lambda table, index: table.index_select(0, index),
        table=lambda values: torch.from_numpy(values).to(device),
        draw=device_draw,
    )


class DeviceToy:
    """N copies of a toy, which show what a `toys.ToyEnv` shows; a `DeviceEnv`."""

    def __init__(
        self,
        spec: EnvSpec,
        rules: Rules,
        *,
        num_envs: int,
        seed: int,
        first_env: int = 0,
        device: str = "cpu",
    ) -> None:
        """Takes rules over `torch_arrays`, of the same device."""
        self.spec = spec
        self.num_envs = num_envs
        self.truncates = rules.truncates
        self._rules = rules
        self._key = device_keys(seed, num_envs=num_envs, first_env=first_env, device=device)

    def begin(self) -> State:
        """Starts the first episode of every copy."""
        return started(self._rules, self._key.clone(), torch.zeros_like(self._key))

    def step(self, state: State, action: Tensor) -> Moved:
        """Makes a step."""
        return Moved(*self._rules.step(state, action))

    def restart(self, state: State, ended: Tensor) -> State:
        """Draws how the next episodes start."""
        return restarted(self._rules, state, ended)

    def observe(self, state: State) -> Tensor:
        """Shows all copies."""
        observation: Tensor = self._rules.observe(state)
        return observation
