"""A network of your own: a function that takes the environment's spec and returns a module.

    headrace train catch --network own_network:residual --total-frames 20000
    headrace eval runs/… --trust-code

The second command imports this file because it is told to: a run that you were sent names code too.
"""

import math

import torch
from torch import Tensor, nn

from headrace.networks.models import NetworkConfig, PolicyValueNet
from headrace.specs import EnvSpec


class ResidualTorso(nn.Module):
    """Two residual blocks over the flattened observations; [N, K, ...] to [N, 64]."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, 64)
        self.blocks = nn.ModuleList([nn.Linear(64, 64) for _ in range(2)])

    def forward(self, observation: Tensor) -> Tensor:
        """Returns features."""
        features = self.first(observation.flatten(1).float())
        for block in self.blocks:
            features = features + block(torch.relu(features))
        return torch.relu(features)


def residual(spec: EnvSpec, config: NetworkConfig) -> PolicyValueNet:
    """Builds the torso for `spec`.

    Heads for its actions, and by config the LSTM, the normaliser and a second torso, come with
    PolicyValueNet. Without it: any module that, called with (PolicyInput, recurrent state), returns
    (PolicyValue, recurrent state), and has `initial_state(batch)`.
    """
    return PolicyValueNet(ResidualTorso(math.prod(spec.stacked_shape)), 64, spec, config)
