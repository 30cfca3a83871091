"""Heads: features [..., F] to the parameters of a policy, or to a value.

They start as is usual for actor-critics (Andrychowicz et al. 2021, "What matters in on-policy RL"):
orthogonal, scaled 0.01 for the policy, so that it starts close to uniform, and 1 for the value.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace.ops.distributions import Distribution
from headrace.ops.squashed_normal import SquashedNormal

_POLICY_SCALE = 0.01


class NormalHead(nn.Module):
    """Mean and log standard deviation [..., 2 D] of a squashed normal."""

    def __init__(
        self, features: int, components: int, *, initial_log_std: float, state_dependent: bool
    ) -> None:
        """Takes the sizes and how wide the policy starts.

        Args:
            features: Length of the input.
            components: D.
            initial_log_std: Log standard deviation at the start.
            state_dependent: Whether features set the deviation too; else it is one learned
                parameter per component, the same in every state.
        """
        super().__init__()
        self.mean = linear_head(features, components, scale=_POLICY_SCALE)
        self.spread: nn.Linear | None = None
        if state_dependent:
            self.spread = linear_head(features, components, scale=_POLICY_SCALE)
            nn.init.constant_(self.spread.bias, initial_log_std)
        else:
            self.log_std = nn.Parameter(torch.full((components,), initial_log_std))

    def forward(self, features: Tensor) -> Tensor:
        """Returns mean and log standard deviation side by side."""
        mean = self.mean(features)
        log_std = self.log_std.expand_as(mean) if self.spread is None else self.spread(features)
        return torch.cat((mean, log_std), dim=-1)


def policy_head(
    features: int, distribution: Distribution, *, initial_log_std: float, state_dependent_std: bool
) -> nn.Module:
    """Returns the head that gives `distribution` its parameters."""
    if isinstance(distribution, SquashedNormal):
        return NormalHead(
            features,
            len(distribution.low),
            initial_log_std=initial_log_std,
            state_dependent=state_dependent_std,
        )
    return linear_head(features, distribution.num_parameters, scale=_POLICY_SCALE)


def value_head(features: int) -> nn.Linear:
    """Returns the head that gives one value."""
    return linear_head(features, 1, scale=1.0)


def linear_head(inputs: int, outputs: int, *, scale: float) -> nn.Linear:
    """A linear layer with orthogonal weight of the given scale and zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, scale)
    nn.init.zeros_(layer.bias)
    return layer
