"""The stages of a run whose environments are written in torch, each by itself (see `stages`)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from headrace.config import RunConfig
from headrace.envs.device import Moved, State
from headrace.pools.device import DevicePool
from headrace.run.build import exploration
from headrace.run.device_pool import make_device_pool
from headrace.run.device_seat import make_device_seat
from headrace.server.acting import Actor
from headrace.server.device_seat import DeviceSeat
from headrace.server.graphs import cuda_capture
from headrace.specs import EnvSpec

_ACTIONS = 16  # batches of random actions, taken in turn


def device_environment(config: RunConfig, device: torch.device) -> Callable[[], int]:
    """Starts a run's environments beside no policy.

    Returns:
        What steps all of them once with random actions, and says how many they are.
    """
    num_envs = config.server.num_envs
    pool = make_device_pool(
        config, num_envs=num_envs, batch_size=num_envs, seed=config.seed, device=device
    )
    finals = pool.env.truncates
    if device.type != "cuda":
        actions = itertools.cycle(_random_actions(pool.spec, num_envs).to(device))

        def step() -> int:
            pool.advance(next(actions), finals=finals)
            return num_envs

        return step
    pool.stay_in_place(finals=finals)
    drawn = _random_actions(pool.spec, num_envs).to(device)

    def all_steps() -> None:
        for action in drawn:
            pool.advance(action, finals=finals)

    replay, _ = cuda_capture(None)(all_steps)

    def steps() -> int:
        replay()
        return num_envs * _ACTIONS

    return steps


def free_device_seat(
    config: RunConfig, actor: Actor, spec: EnvSpec, *, device: torch.device, reader: torch.device
) -> DeviceSeat:
    """Returns a seat of environments whose steps cost nothing, on a GPU with its graph captured."""
    env = FreeDeviceEnv(spec, num_envs=config.server.num_envs, device=device)
    seat = make_device_seat(
        config,
        actor.algorithm,
        pool=DevicePool(env, batch_size=env.num_envs),
        model=actor.model,
        actor=actor,
        exploration=exploration(actor.algorithm, env.num_envs),
        on_episodes=lambda *_: None,
        reader=reader,
    )
    if device.type == "cuda":
        seat.warm_up(cuda_capture(actor.generator))
    return seat


class FreeDeviceEnv:
    """Environments that always show the same; a `DeviceEnv`."""

    truncates = False

    def __init__(self, spec: EnvSpec, *, num_envs: int, device: torch.device) -> None:
        self.spec = spec
        self.num_envs = num_envs
        space = copy.deepcopy(spec.observation_space)  # drawing from it changes it
        space.seed(0)
        frame = torch.from_numpy(np.asarray(space.sample()))
        self._frames = frame.to(device).expand(num_envs, *frame.shape).contiguous()

    def begin(self) -> State:
        """What each shows is all that there is."""
        return {"frame": self._frames}

    def step(self, state: State, action: Tensor) -> Moved:
        """Forgets the actions."""
        reward = torch.zeros(len(action), device=action.device)
        return Moved(state, reward, reward > 0, reward > 0)

    def restart(self, state: State, ended: Tensor) -> State:
        """Never happens."""
        return state

    def observe(self, state: State) -> Tensor:
        """Shows what it always shows."""
        return state["frame"]


def _random_actions(spec: EnvSpec, num_envs: int) -> Tensor:
    rng, shape = np.random.default_rng(0), (_ACTIONS, num_envs, *spec.action_shape)
    if isinstance(spec.action_space, gym.spaces.Box):
        low, high = spec.action_space.low, spec.action_space.high
        return torch.from_numpy(rng.uniform(low, high, shape).astype(np.float32))
    choices = spec.action_choices if spec.action_shape else spec.num_actions
    return torch.from_numpy(rng.integers(choices, size=shape))
