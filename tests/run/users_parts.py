"""What a user brings, for tests of modes and draws; found through the sys.path of the test."""

from __future__ import annotations

import math
import random
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from headrace.networks.config import NetworkConfig
from headrace.networks.models import AnyNet, assemble
from headrace.specs import EnvSpec

FEATURES = 16


class Witness(nn.Module):
    """Raises, in whichever process, unless passes with a gradient are those in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training != torch.is_grad_enabled():
            raise RuntimeError(f"training={self.training} where grad={torch.is_grad_enabled()}")
        return x


def _assembled(spec: EnvSpec, config: NetworkConfig, *parts: Any) -> AnyNet:
    size = math.prod(spec.stacked_shape)
    return assemble(
        lambda: nn.Sequential(
            Floats(), nn.Linear(size, FEATURES), *(part() for part in parts), nn.Tanh()
        ),
        FEATURES,
        spec,
        config,
    )


class Floats(nn.Module):
    """Casts and flattens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).float()


def strict(spec: EnvSpec, config: NetworkConfig) -> AnyNet:
    """Batch norm and dropout, watched."""
    return _assembled(spec, config, Witness, lambda: nn.BatchNorm1d(FEATURES), nn.Dropout)


def dropout(spec: EnvSpec, config: NetworkConfig) -> AnyNet:
    """Dropout."""
    return _assembled(spec, config, nn.Dropout)


def batch_norm(spec: EnvSpec, config: NetworkConfig) -> AnyNet:
    """Batch norm."""
    return _assembled(spec, config, lambda: nn.BatchNorm1d(FEATURES))


class Chancy(gym.Env[Any, Any]):
    """Draws from the global states of numpy, Python and torch."""

    action_space = gym.spaces.Discrete(2)
    observation_space = gym.spaces.Box(-10.0, 10.0, (3,), np.float32)

    def _seen(self) -> np.ndarray:
        normal = np.random.standard_normal()  # noqa: NPY002 - the global state is meant
        return np.float32([normal, random.random(), float(torch.rand(1))]).clip(-9.0, 9.0)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        seen = self._seen()
        return seen, float(action * seen[0]), random.random() < 0.1, False, {}
