"""Networks of an actor and several critics: a policy, and Q of an observation and an action.

SAC (Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications", arXiv:1812.05905); with
dropout and layer norm the critics of DroQ (Hiraoka et al. 2022, "Dropout Q-functions for doubly
efficient reinforcement learning", arXiv:2110.02034).

All critics are one stack of layers with weights [N, in, out], so that a layer costs one batched
matrix product, whatever N is. They share nothing with the actor: its loss must not pull at what
they see by.

Shape suffixes: U = rows in order, B = rows of a batch, N = critics, P = parameters of the policy,
D = components of an action, F = features, H = width of a hidden layer.

Everything runs in float32, but for the matrix products between hidden layers if `products` says so:
observations, actions and Q-values carry more than the 8 bits of bfloat16, and what is bootstrapped
a hundred times over adds its roundings up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import gymnasium as gym
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.errors import ConfigError
from headrace.networks.config import NetworkConfig
from headrace.networks.heads import NormalHead
from headrace.networks.normalizer import ObservationNormalizer, Observer, frame_normalizer
from headrace.networks.torsos import MlpTorso, low_product
from headrace.records import PolicyInput
from headrace.specs import EnvSpec

_WIDE = 128


class ActorOutput(NamedTuple):
    """What acting needs of each row."""

    parameters: Tensor  # [U, B, P] float32 mean and log deviation
    value: Tensor  # [U, B] float32 zeros: critics are for learning, acting does not pay for them


class Actor(nn.Module):
    """Observations to the parameters of a squashed normal whose deviation depends on them.

    The log deviation is not bounded here: `ops.squashed_normal` clamps it to [-10, 2] wherever it
    is used, so that server and learner mean the same policy. A clamp, as published, and no smooth
    bound, whose slope would be small everywhere; it starts in the middle, at `initial_log_std`.
    """

    def __init__(
        self, torso: nn.Module, features: int, components: int, *, initial_log_std: float
    ) -> None:
        """Takes the torso, the F that it gives, D, and how wide the policy starts."""
        super().__init__()
        self.torso = torso
        self.head = NormalHead(
            features, components, initial_log_std=initial_log_std, state_dependent=True
        )

    def forward(self, rows: Tensor) -> Tensor:
        """Returns parameters [B, P] of rows [B, K, ...]."""
        features_BF: Tensor = self.torso(rows).float()
        return self.head(features_BF)  # type: ignore[no-any-return]


class Critics(nn.Module):
    """Q of rows and actions by N critics that differ in where they start.

    What makes features of an image is one torso for all of them; vectors go in as they are.
    Layers start as PyTorch's do.
    """

    def __init__(self, torso: nn.Module | None, inputs: int, config: NetworkConfig) -> None:
        """Takes the torso, if there is one, and the length of what it gives plus D."""
        super().__init__()
        self.torso = torso
        self.scale = 1.0
        self.products = torch.float32
        """Of the matrix products between hidden layers; sums and all else are float32."""
        self.activation = config.activation
        self.dropout = config.critic_dropout
        count, sizes = config.num_critics, (inputs, *config.hidden_sizes, 1)
        self.weights = nn.ParameterList(
            _uniform(count, a, b, bound=a**-0.5) for a, b in pairwise(sizes)
        )
        self.biases = nn.ParameterList(
            _uniform(count, 1, b, bound=a**-0.5) for a, b in pairwise(sizes)
        )
        self.gains: nn.ParameterList | None = None
        self.shifts: nn.ParameterList | None = None
        if config.critic_layer_norm:
            widths = config.hidden_sizes
            self.gains = nn.ParameterList(torch.ones(count, 1, width) for width in widths)
            self.shifts = nn.ParameterList(torch.zeros(count, 1, width) for width in widths)

    def forward(self, rows: Tensor, action: Tensor, masks: tuple[Tensor, ...] = ()) -> Tensor:
        """Returns Q [N, B] of rows [B, K, ...] and actions [B, D] as they are before the squash.

        Args:
            rows: Observations, normalised where they are.
            action: What `PolicyStep.action` holds.
            masks: Of `dropout_masks`; () to drop nothing.
        """
        features_BF = rows.flatten(1).float() * self.scale
        if self.torso is not None:
            features_BF = self.torso(rows).float()
        x_BF = torch.cat((features_BF, action.tanh()), dim=-1)
        x = x_BF.expand(len(self.weights[0]), -1, -1)
        *hidden, (last_weight, last_bias) = zip(self.weights, self.biases, strict=True)
        for index, (weight, bias) in enumerate(hidden):
            if index and self.products != torch.float32:
                x = low_product(x, weight, self.products) + bias
            else:
                x = torch.baddbmm(bias, x, weight)
            x = self._activated(x, index, masks)
        # A product with a single column, as sums: a compiler makes them one with what is around.
        q_NB: Tensor = (x * last_weight.transpose(1, 2)).sum(dim=-1) + last_bias.squeeze(-1)
        return q_NB

    def dropout_masks(self, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Draws what hidden units are multiplied by, each [N, B, H]; () where none are dropped.

        They are drawn outside of `forward`, so that it is a function of tensors.
        """
        if not self.dropout:
            return ()
        keep = 1.0 - self.dropout
        return tuple(
            torch.empty(len(weight), batch, weight.shape[2], device=generator.device)
            .bernoulli_(keep, generator=generator)
            .div_(keep)
            for weight in list(self.weights)[:-1]
        )

    def _activated(self, x_NBH: Tensor, index: int, masks: tuple[Tensor, ...]) -> Tensor:
        """Drops, normalises, activates: in DroQ's order."""
        if masks:
            x_NBH = x_NBH * masks[index]
        if self.gains is not None and self.shifts is not None:
            normal_NBH = F.layer_norm(x_NBH, x_NBH.shape[-1:])
            x_NBH = torch.addcmul(self.shifts[index], normal_NBH, self.gains[index])
        return x_NBH.tanh() if self.activation == "tanh" else x_NBH.relu()


class ActorCriticsNet(nn.Module):
    """An actor and N critics, each side with what it sees by."""

    def __init__(
        self,
        torso: Callable[[], nn.Module],
        features: int,
        spec: EnvSpec,
        config: NetworkConfig,
    ) -> None:
        """Puts a network together.

        Args:
            torso: Makes what turns stacked observations [B, K, ...] into features [B, F]: one for
                the actor, and unless that is an MLP, whose hidden layers critics have anyway, one
                for all critics.
            features: F.
            spec: What the head is built from.
            config: Number and kind of the critics, their hidden layers, and whether observations
                are normalised.

        Raises:
            ConfigError: actions are not continuous, or an LSTM is asked for.
        """
        super().__init__()
        space = spec.action_space
        if not isinstance(space, gym.spaces.Box):
            raise ConfigError(
                f"{spec.name}: critics of actions need continuous actions, not {space}: use "
                "--algorithm r2d2, impala or ppo"
            )
        if config.lstm_size:
            raise ConfigError(
                f"heads {config.heads} have no LSTM, and lstm_size is {config.lstm_size}: set it "
                "to 0, or use --algorithm impala or ppo"
            )
        components = math.prod(space.shape)
        own = torso()
        self.normalizer: ObservationNormalizer | None = frame_normalizer(
            spec, own, wanted=config.normalize_observations
        )
        self.actor = Actor(own, features, components, initial_log_std=config.initial_log_std)
        if isinstance(own, MlpTorso):
            self.critics = Critics(None, math.prod(spec.stacked_shape) + components, config)
            self.critics.scale = own.scale
        else:
            self.critics = Critics(torso(), features + components, config)

    def forward(
        self, inputs: PolicyInput, recurrent: tuple[Tensor, ...]
    ) -> tuple[ActorOutput, tuple[Tensor, ...]]:
        """Runs the actor on rows [U, B]; there is no recurrent state."""
        shape = inputs.observation.shape[:2]
        parameters_UBP = self.actor(self.rows(inputs.observation.flatten(0, 1))).unflatten(0, shape)
        value_UB = parameters_UBP.new_zeros(shape)
        return ActorOutput(parameters_UBP, value_UB), recurrent

    def rows(self, observation: Tensor) -> Tensor:
        """What actor and critics are given of observations [B, K, ...]: normalised if wanted."""
        return observation if self.normalizer is None else self.normalizer(observation)

    def set_products(self, dtype: torch.dtype) -> None:
        """Chooses the dtype of the matrix products between hidden layers of vectors.

        Layers narrower than 128 stay in float32: they gain nothing.
        """
        inner = list(self.critics.weights)[1:-1]
        if min((weight.shape[1] for weight in inner), default=0) < _WIDE:
            dtype = torch.float32
        self.critics.products = dtype
        if isinstance(self.actor.torso, MlpTorso):
            self.actor.torso.products = dtype

    def acting_tensors(self) -> list[Tensor]:
        """Returns what acting needs: those of the critics stay with the learner."""
        parts = [self.actor] if self.normalizer is None else [self.normalizer, self.actor]
        return [x for part in parts for x in (*part.parameters(), *part.buffers())]

    def q(self, observation: Tensor, action: Tensor) -> Tensor:
        """Returns Q [N, B] of observations [B, K, ...] and actions [B, D] before the squash."""
        return self.critics(self.rows(observation), action)  # type: ignore[no-any-return]

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        """Nothing: there is no recurrent state."""
        return ()

    def observe(self, frames: Tensor) -> None:
        """Merges single frames [..., *observation] into the statistics that normalise, if any."""
        sides = (
            (self.normalizer, frames.device),
            (self.actor.torso, self.actor.head.mean.weight.device),
            (self.critics.torso, self.critics.weights[0].device),
        )
        for part, device in sides:
            if isinstance(part, Observer):
                part.observe(frames.to(device))


def _uniform(*shape: int, bound: float) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
