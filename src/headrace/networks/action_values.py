"""Networks of action values: a torso, perhaps an LSTM, and a head that gives Q of every action.

R2D2 (Kapturowski et al. 2019, "Recurrent experience replay in distributed reinforcement learning")
and, without the LSTM, DQN (Mnih et al. 2015).

Shape suffixes: U = rows in order, B = unrolls (or environments), F = features, A = actions, H =
width of the LSTM.

As in `models`, only the torso may run in low precision.
"""

from __future__ import annotations

from typing import NamedTuple

import gymnasium as gym
import torch
from torch import Tensor, nn

from headrace.errors import ConfigError
from headrace.networks.config import NetworkConfig
from headrace.networks.heads import action_value_head
from headrace.networks.normalizer import ObservationNormalizer, Observer, frame_normalizer
from headrace.networks.recurrent import ResetLSTM
from headrace.ops.distributions import one_hot
from headrace.records import PolicyInput
from headrace.specs import EnvSpec


class ActionValues(NamedTuple):
    """What the head says of each row."""

    value: Tensor  # [U, B, A] float32 Q, in the unit that the algorithm learns it in
    states: tuple[Tensor, ...]  # each [U, B, H] recurrent state after the row; () without an LSTM


class ActionValueNet(nn.Module):
    """Q of every action over one torso."""

    exploration_left: Tensor

    def __init__(
        self, torso: nn.Module, features: int, spec: EnvSpec, config: NetworkConfig
    ) -> None:
        """Puts a network together.

        Args:
            torso: Stacked observations [N, K, ...] to features [N, F]; it casts its own input.
            features: F.
            spec: What the head is built from.
            config: Everything after the torso, and whether its input is normalised. Heads are
                duelling but for `heads` "action_value".

        Raises:
            ConfigError: actions are not one discrete choice.
        """
        super().__init__()
        if not isinstance(spec.action_space, gym.spaces.Discrete):
            raise ConfigError(
                f"{spec.name}: a network of action values needs one discrete action, not "
                f"{spec.action_space}; use an algorithm that learns a policy, such as ppo"
            )
        self.num_actions = spec.num_actions
        # 1 where exploration is as at the start of a run, 0 where it is at its end.
        self.register_buffer("exploration_left", torch.zeros(()), persistent=False)
        self.normalizer: ObservationNormalizer | None = frame_normalizer(
            spec, torso, wanted=config.normalize_observations
        )
        self.torso = torso
        self.core: ResetLSTM | None = None
        if config.lstm_size:
            self.core = ResetLSTM(features + 1 + self.num_actions, config.lstm_size)
        self.head = action_value_head(
            config.lstm_size or features,
            self.num_actions,
            duelling=config.heads != "action_value",
        )

    def forward(
        self, inputs: PolicyInput, recurrent: tuple[Tensor, ...]
    ) -> tuple[ActionValues, tuple[Tensor, ...]]:
        """Runs rows [U, B] in order, clearing the recurrent state before rows that reset."""
        shape = inputs.observation.shape[:2]
        rows = inputs.observation.flatten(0, 1)
        if self.normalizer is not None:
            rows = self.normalizer(rows)
        features_UBF = self.torso(rows).float().unflatten(0, shape)
        states: tuple[Tensor, ...] = ()
        with torch.autocast(rows.device.type, enabled=False):
            if self.core is not None:
                h_BH, c_BH = recurrent
                core_input_UBF = self._core_input(features_UBF, inputs)
                states, recurrent = self.core.unroll(core_input_UBF, inputs.reset, (h_BH, c_BH))
                features_UBF = states[0]
            value_UBA = self.head(features_UBF)
        return ActionValues(value_UBA, states), recurrent

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        """Zero recurrent state for `batch` environments: h and c, or nothing without an LSTM."""
        if self.core is None:
            return ()
        zeros_BH = torch.zeros(batch, self.core.hidden, device=self.core.input.weight.device)
        return zeros_BH, zeros_BH.clone()

    def observe(self, frames: Tensor) -> None:
        """Merges single frames [..., *observation] into the statistics that normalise, if any."""
        for part in (self.normalizer, self.torso):
            if isinstance(part, Observer):
                part.observe(frames)

    def _core_input(self, features_UBF: Tensor, inputs: PolicyInput) -> Tensor:
        """Adds the reward as it is, not clipped, and the previous action, as R2D2 does."""
        action_UBA = one_hot(inputs.previous_action, self.num_actions)
        return torch.cat((features_UBF, inputs.reward.unsqueeze(-1), action_UBA), dim=-1)
