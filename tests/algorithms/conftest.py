"""Specs of every kind of action, and random batches for them, as fixtures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from headrace.records import Batch, PolicyInput
from headrace.specs import EnvSpec

ACTIONS: dict[str, Any] = {
    "discrete": gym.spaces.Discrete(4),
    "multi": gym.spaces.MultiDiscrete([3, 2]),
    "continuous": gym.spaces.Box(np.float32([-1, 0]), np.float32([1, 5])),
}


def _spec_of(kind: str, *, features: int = 5, mask: bool = False) -> EnvSpec:
    return EnvSpec(
        name="Test-v0",
        observation_space=gym.spaces.Box(-np.inf, np.inf, (features,), np.float32),
        action_space=ACTIONS[kind],
        has_action_mask=mask,
    )


def _random_actions(spec: EnvSpec, *leading: int, generator: torch.Generator) -> torch.Tensor:
    if isinstance(spec.action_space, gym.spaces.Box):
        return torch.randn(*leading, *spec.action_shape, generator=generator)
    columns = [torch.randint(n, leading, generator=generator) for n in spec.action_choices]
    return columns[0] if not spec.action_shape else torch.stack(columns, dim=-1)


def _random_batch(
    spec: EnvSpec, recurrent: tuple[torch.Tensor, ...], *, T: int, B: int, seed: int = 0
) -> Batch:
    """A batch as `align` makes it: ends inside, previous actions and rewards cleared there."""
    generator = torch.Generator().manual_seed(seed)
    ended = torch.rand(T, B, generator=generator) < 0.2
    is_cut = torch.rand(T, B, generator=generator) < 0.5
    reset = torch.cat((torch.zeros(1, B, dtype=torch.bool), ended))
    action = _random_actions(spec, T, B, generator=generator)
    first = _random_actions(spec, 1, B, generator=generator)
    previous = torch.cat((first, action))
    start = 0 if previous.is_floating_point() else -1
    where = reset.view(T + 1, B, *[1] * (previous.dim() - 2))
    reward = torch.randn(T, B, generator=generator)
    mask = None
    if spec.has_action_mask:
        mask = torch.rand(T + 1, B, spec.action_mask_size, generator=generator) < 0.6
        if not spec.action_shape:  # what was done was allowed
            mask[:-1].scatter_(-1, action.unsqueeze(-1), True)
    return Batch(
        inputs=PolicyInput(
            observation=torch.randn(
                T + 1, B, 1, *spec.observation_space.shape, generator=generator
            ),
            reward=torch.cat((torch.zeros(1, B), reward)) * ~reset,
            previous_action=torch.where(where, start, previous),
            reset=reset,
            action_mask=mask,
        ),
        recurrent=recurrent,
        action=action,
        log_prob=-1.0 - torch.rand(T, B, generator=generator),
        reward=reward,
        terminated=ended & ~is_cut,
        truncated=ended & is_cut,
        bootstrap=torch.where(ended & is_cut, torch.randn(T, B, generator=generator), 0.0),
        version=torch.zeros(T, B, dtype=torch.int64),
    )


@pytest.fixture
def spec_of() -> Callable[..., EnvSpec]:
    return _spec_of


@pytest.fixture
def random_batch() -> Callable[..., Batch]:
    return _random_batch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
