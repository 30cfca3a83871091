"""Networks for tests of modes and draws, found through the sys.path of the test.

Each part says by an exception where it runs in the wrong mode, in whichever process that is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from headrace.networks.config import NetworkConfig
from headrace.networks.models import AnyNet, assemble
from headrace.specs import EnvSpec

FEATURES = 16


class Witness(nn.Module):
    """Raises unless a pass is in training mode exactly where it has a gradient."""

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
