"""Environments written in torch, which live beside the policy: nothing of a step leaves the device.

A `DeviceEnv` is four functions of tensors. What it keeps of its environments is a dict of tensors
with a row for each, which is handed in and out; so it can be saved, cut into batches and captured
by a CUDA graph without the environment's help. What all environments do alike is done here, once:
`advance` starts ended ones anew in the same step and shows their final observations.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from headrace.envs.draws import GAMMA, MIX, stream_keys
from headrace.specs import EnvSpec

# The constants of `draws` as int64, in which torch computes; a compiler takes no numpy's numbers.
_GAMMA = int(GAMMA.astype(np.int64))
_MIX = tuple(int(word.astype(np.int64)) for word in MIX)

State = dict[str, Tensor]
"""What is kept of N environments, random streams too: tensors [N, ...] by name."""


class Moved(NamedTuple):
    """What a step has made of N environments, before any of them starts anew."""

    state: State
    reward: Tensor  # [N] float32, raw
    terminated: Tensor  # [N] bool: the step ended the MDP
    truncated: Tensor  # [N] bool: the step met the clock; not looked at where terminated


class DeviceRows(NamedTuple):
    """What N environments show: a `steps.EnvStep` on the device, of all of them, in order."""

    observation: Tensor  # [N, ...] after an end, the first of the next episode
    reward: Tensor  # [N] float32 of the step just made, raw
    reset: Tensor  # [N] bool: this observation is the first of an episode
    terminated: Tensor  # [N] bool
    truncated: Tensor  # [N] bool
    final_observation: Tensor | None = None  # [N, ...] valid where terminated or truncated


class DeviceEnv(Protocol):
    """N environments in torch. A family gives them by `make_device` (see `DeviceFamily`).

    Its functions change nothing that they are given, have no shape or branch that depends on the
    values in a tensor, and never wait for the device (no `.item()`, `.cpu()`, `if tensor`): on a
    GPU they are recorded once and replayed. All but `begin` are also called for some of the
    environments, with their rows of the state alone.
    """

    spec: EnvSpec
    num_envs: int
    truncates: bool
    """Whether a clock can end episodes: then what lies past their end has a value, which costs a
    second run of the policy."""

    def begin(self) -> State:
        """Returns all N at the start of their first episodes."""

    def step(self, state: State, action: Tensor) -> Moved:
        """Makes a step with `action` [N, ...], int64 or float32, which lies in the space."""

    def restart(self, state: State, ended: Tensor) -> State:
        """Returns the state with a new episode begun where `ended` [N] is set."""

    def observe(self, state: State) -> Tensor:
        """Returns the observations [N, ...], in the dtype of the space."""


class DeviceFamily(Protocol):
    """What an environment family says besides if it has environments in torch."""

    def make_device(
        self, name: str, config: object, *, num_envs: int, seed: int, first_env: int, device: str
    ) -> DeviceEnv:
        """Makes `num_envs` copies on `device`, a name such as cuda:0; the rest is as in `make`."""


def first_rows(env: DeviceEnv, state: State) -> DeviceRows:
    """Returns what all show at the start: a reset alone."""
    observation = env.observe(state)
    never = torch.zeros(len(observation), dtype=torch.bool, device=observation.device)
    reward = torch.zeros(len(observation), device=observation.device)
    return DeviceRows(observation, reward, ~never, never, never.clone())


def advance(
    env: DeviceEnv, state: State, action: Tensor, *, finals: bool
) -> tuple[State, DeviceRows]:
    """Makes a step and starts what has ended anew; shows final observations if asked to."""
    moved = env.step(state, action)
    ended = moved.terminated | moved.truncated
    final = env.observe(moved.state) if finals else None
    state = env.restart(moved.state, ended)
    return state, DeviceRows(
        observation=env.observe(state),
        reward=moved.reward,
        reset=ended,
        terminated=moved.terminated,
        truncated=moved.truncated & ~moved.terminated,
        final_observation=final,
    )


def device_keys(seed: int, *, num_envs: int, first_env: int, device: str) -> Tensor:
    """Returns the keys [N] int64 of the environments' random streams: `draws.stream_keys`."""
    keys = stream_keys(seed, first_env + num_envs)[first_env:]
    return torch.from_numpy(keys.view(np.int64).copy()).to(device)


def device_draw(key: Tensor, count: Tensor, num_values: int) -> Tensor:
    """Returns what `draws.draw` does, from the same streams: key and count [N] int64."""
    # int64 wraps as uint64 does; only what shifts and divides must not see the sign.
    word = key + (count + 1) * _GAMMA
    word = (word ^ _shifted(word, 30)) * _MIX[0]
    word = (word ^ _shifted(word, 27)) * _MIX[1]
    word = word ^ _shifted(word, 31)
    value: Tensor = (_shifted(word, 1) % num_values * 2 + (word & 1)) % num_values
    return value


def _shifted(word: Tensor, bits: int) -> Tensor:
    """Shifts right as an unsigned number is shifted."""
    shifted: Tensor = (word >> bits) & (2 ** (64 - bits) - 1)
    return shifted
