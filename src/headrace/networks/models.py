"""Actor-critic networks: a torso, perhaps an LSTM, a policy head and a value head.

Shape suffixes: U = rows in order, B = unrolls (or environments), F = features, A = actions.

Only the torso may run in low precision: in the learner under autocast, on the server with weights
that `lower_precision` has cast. The core and the heads always run in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from headrace.errors import ConfigError
from headrace.networks.recurrent import ResetLSTM
from headrace.networks.torsos import (
    NATURE_CONVS,
    SHALLOW_CONVS,
    ConvTorso,
    DeepTorso,
    MlpTorso,
)
from headrace.records import PolicyInput
from headrace.specs import EnvSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """Which network to build."""

    network: str = "auto"
    """Name in the catalog, or "my_module:function"; auto: nature for images, mlp for the rest."""
    lstm_size: int = 0
    """Width of the LSTM after the torso; 0 for none."""

    def __post_init__(self) -> None:
        if self.lstm_size < 0:
            raise ConfigError(f"lstm_size must be 0 (no LSTM) or more, not {self.lstm_size}")


class PolicyValue(NamedTuple):
    """What the heads say of each row."""

    logits: Tensor  # [U, B, A] float32, unnormalised log-probabilities
    value: Tensor  # [U, B] float32


class PolicyValueNet(nn.Module):
    """Policy and value over one torso.

    Heads start as is usual for actor-critics (Andrychowicz et al. 2021, "What matters in on-policy
    RL"): orthogonal, scaled 0.01 for the policy, so that it starts close to uniform, and 1 for the
    value. Plain convolutional torsos start orthogonal, scaled by the root of 2; the residual one
    and the MLP keep PyTorch's initialisation.
    """

    def __init__(
        self, torso: nn.Module, features: int, num_actions: int, lstm_size: int = 0
    ) -> None:
        """Takes a torso that maps [N, K, ...] to [N, features] and casts its own input."""
        super().__init__()
        self.num_actions = num_actions
        self.torso = torso
        self.core = ResetLSTM(features + 1 + num_actions, lstm_size) if lstm_size else None
        self.policy = _head(lstm_size or features, num_actions, scale=0.01)
        self.value = _head(lstm_size or features, 1, scale=1.0)

    def forward(
        self, inputs: PolicyInput, recurrent: tuple[Tensor, ...]
    ) -> tuple[PolicyValue, tuple[Tensor, ...]]:
        """Runs rows [U, B] in order, clearing the recurrent state before rows that reset."""
        observation = inputs.observation
        features_UBF = (
            self.torso(observation.flatten(0, 1)).float().unflatten(0, observation.shape[:2])
        )
        with torch.autocast(observation.device.type, enabled=False):
            if self.core is not None:
                h_BH, c_BH = recurrent
                core_input_UBF = self._core_input(features_UBF, inputs)
                features_UBF, recurrent = self.core(core_input_UBF, inputs.reset, (h_BH, c_BH))
            logits_UBA = self.policy(features_UBF)
            value_UB = self.value(features_UBF).squeeze(-1)
        return PolicyValue(logits_UBA, value_UB), recurrent

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        """Zero recurrent state for `batch` environments: h and c, or nothing without an LSTM."""
        if self.core is None:
            return ()
        zeros_BH = torch.zeros(batch, self.core.hidden, device=self.value.weight.device)
        return zeros_BH, zeros_BH.clone()

    def _core_input(self, features_UBF: Tensor, inputs: PolicyInput) -> Tensor:
        """Adds the clipped reward and the previous action, as IMPALA does (figure 3)."""
        actions_A = torch.arange(self.num_actions, device=features_UBF.device)
        # Comparing gives zeros for -1, the start of an episode; F.one_hot waits for the device.
        action_UBA = (inputs.previous_action.unsqueeze(-1) == actions_A).float()
        reward_UB1 = inputs.reward.clamp(-1.0, 1.0).unsqueeze(-1)
        return torch.cat((features_UBF, reward_UB1, action_UBA), dim=-1)


def lower_precision(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the weights of the torso, in place, and nothing else.

    A model that is no `PolicyValueNet`, or whose torso needs float32, is left as it is.
    """
    if isinstance(model, PolicyValueNet) and not isinstance(model.torso, MlpTorso):
        model.torso.to(dtype)


def nature(spec: EnvSpec, config: NetworkConfig) -> PolicyValueNet:
    """Three convolutions and 512 features (Mnih et al. 2015, "Human-level control")."""
    torso = ConvTorso(_image_shape(spec, "nature", 36), NATURE_CONVS, features=512)
    return PolicyValueNet(torso, 512, spec.num_actions, config.lstm_size)


def impala_shallow(spec: EnvSpec, config: NetworkConfig) -> PolicyValueNet:
    """Two convolutions and 256 features (IMPALA, figure 3, left)."""
    torso = ConvTorso(_image_shape(spec, "impala_shallow", 20), SHALLOW_CONVS, features=256)
    return PolicyValueNet(torso, 256, spec.num_actions, config.lstm_size)


def impala_deep(spec: EnvSpec, config: NetworkConfig) -> PolicyValueNet:
    """Fifteen convolutions in residual blocks and 256 features (IMPALA, figure 3, right)."""
    torso = DeepTorso(_image_shape(spec, "impala_deep", 8), features=256)
    return PolicyValueNet(torso, 256, spec.num_actions, config.lstm_size)


def mlp(spec: EnvSpec, config: NetworkConfig) -> PolicyValueNet:
    """Two hidden layers of 64 over the flattened observation; uint8 is scaled to [0, 1]."""
    space = spec.observation_space
    scale = 1.0 / max(1.0, float(space.high.max())) if space.dtype == np.uint8 else 1.0
    torso = MlpTorso(math.prod(spec.stacked_shape), (64, 64), scale=scale)
    return PolicyValueNet(torso, 64, spec.num_actions, config.lstm_size)


def _image_shape(spec: EnvSpec, network: str, min_pixels: int) -> tuple[int, int, int]:
    """Shape [C, H, W] of what the torso convolves, C = stacked frames times colours."""
    space = spec.observation_space
    shape = space.shape
    if space.dtype != np.uint8 or len(shape) not in (2, 3) or min(shape[:2]) < min_pixels:
        raise ConfigError(
            f"{spec.name}: network {network} needs uint8 images of at least {min_pixels} x "
            f"{min_pixels} pixels, not {space.dtype} of shape {shape}; use network mlp"
        )
    return spec.frame_stack * math.prod(shape[2:]), shape[0], shape[1]


def _head(inputs: int, outputs: int, *, scale: float) -> nn.Linear:
    """A linear layer with orthogonal weight of the given scale and zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, scale)
    nn.init.zeros_(layer.bias)
    return layer
