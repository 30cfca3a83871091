"""Heads: features [..., F] to the parameters of a policy, to a value, or to action values.

Those of a policy and its value start as is usual for actor-critics (Andrychowicz et al. 2021, "What
matters in on-policy RL"): orthogonal, scaled 0.01 for the policy, so that it starts close to
uniform, and 1 for the value. How action values start, `action_value_head` says.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.algorithms.base import ALONE, Learners
from headrace.ops import popart
from headrace.ops.distributions import Distribution
from headrace.ops.squashed_normal import SquashedNormal

Layer = TypeVar("Layer", bound=nn.Linear | nn.Conv2d)

_POLICY_SCALE = 0.01
_ACTION_VALUE_SCALE = 0.1
_MAX_HIDDEN = 512


class OutputLayer(nn.Linear):
    """The last layer of a head: optimisers may treat it unlike hidden ones."""


class PopArtHead(OutputLayer):
    """Values [..., N] of N tasks, which it learns in units of their spread; see `ops.popart`.

    Weights and statistics move together, and stand together wherever weights go.
    """

    mean_N: Tensor
    square_N: Tensor
    count_N: Tensor

    def __init__(self, features: int, tasks: int = 1, *, step: float) -> None:
        """Takes the length of the input, N, and how far statistics move in an update."""
        super().__init__(features, tasks)
        orthogonal(self, scale=1.0)
        self.step = step
        self.learners: Learners = ALONE  # whose targets are observed together; see `Algorithm`
        for name, value in popart.no_statistics(tasks)._asdict().items():
            self.register_buffer(name, value)
        self.register_buffer("count_N", torch.zeros(tasks, dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        """Returns values in the unit of the rewards."""
        normalized: Tensor = super().forward(features)
        return torch.addcmul(self.mean_N.float(), normalized, self.deviation_N())

    def deviation_N(self) -> Tensor:  # noqa: N802 - the suffix is its shape
        """The unit [N] float32 in which each task's values are learned."""
        return popart.deviation(self._statistics()).float()

    @torch.no_grad()
    def observe_targets(self, target: Tensor, task: Tensor | None = None) -> None:
        """Moves statistics by targets [...] of values, and the layer so that outputs stay.

        In place: what was computed with a gradient before has to be computed again. Batch k moves
        them by 1 / (k + 1), until that is less than `step`: what they start with counts as one.

        Args:
            target: In the unit of the rewards.
            task: As in `ops.popart.updated`; None for the only one.
        """
        if task is None:
            task = torch.zeros((), dtype=torch.int64, device=target.device)
        old = self._statistics()
        step_N = (1.0 / (self.count_N + 2.0)).clamp(min=self.step)
        new = popart.updated(old, target, task, step=step_N, learners=self.learners)
        self.count_N.add_((new.mean_N != old.mean_N) | (new.square_N != old.square_N))
        weight, bias = popart.preserved(self.weight, self.bias, old, new)
        own = (*old, self.weight, self.bias)
        for part, value in zip(own, (*new, weight, bias), strict=True):
            part.copy_(value)

    def _statistics(self) -> popart.Statistics:
        return popart.Statistics(self.mean_N, self.square_N)


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
        if self.spread is None:
            mean = self.mean(features)
            return torch.cat((mean, self.log_std.expand_as(mean)), dim=-1)
        weight = torch.cat((self.mean.weight, self.spread.weight))  # one product instead of two
        return F.linear(features, weight, torch.cat((self.mean.bias, self.spread.bias)))


class DuellingHead(nn.Module):
    """Q [..., A] of every action as a value plus advantages of mean 0 (Wang et al. 2016, eq. 9).

    Each of the two has a hidden layer of its own.
    """

    def __init__(self, features: int, actions: int) -> None:
        """Takes the length of the input, which is the hidden width too up to 512, and A."""
        super().__init__()
        hidden = min(features, _MAX_HIDDEN)
        self.value = _stream(features, hidden, 1)
        # A bias of an advantage would say twice what the bias of the value says.
        self.advantage = _stream(features, hidden, actions, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Returns Q."""
        value: Tensor = self.value(features)
        advantage: Tensor = self.advantage(features)
        return value + advantage - advantage.mean(dim=-1, keepdim=True)


def _stream(features: int, hidden: int, outputs: int, *, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        orthogonal(nn.Linear(features, hidden), scale=math.sqrt(2.0)),
        nn.ReLU(),
        linear_head(hidden, outputs, scale=_ACTION_VALUE_SCALE, bias=bias),
    )


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


def value_head(features: int, *, popart_step: float | None = None) -> OutputLayer:
    """Returns the head that gives one value; with a step, one that normalises what it learns."""
    if popart_step is None:
        return linear_head(features, 1, scale=1.0)
    return PopArtHead(features, step=popart_step)


def popart_head(model: nn.Module) -> PopArtHead | None:
    """Returns the head of a network that normalises its values, if it has one."""
    return next((part for part in model.modules() if isinstance(part, PopArtHead)), None)


def in_units(head: PopArtHead | None, *numbers: Tensor) -> tuple[Tensor, ...]:
    """Returns values, or what is added to them, in the unit that a single task's are learned in."""
    if head is None:
        return numbers
    unit = head.deviation_N()
    return tuple(number / unit for number in numbers)


def popart_metrics(head: PopArtHead | None) -> dict[str, Tensor]:
    """Returns mean and deviation of a single task's targets; nothing without a head."""
    if head is None:
        return {}
    return {"popart/mean": head.mean_N.mean(), "popart/deviation": head.deviation_N().mean()}


def action_value_head(features: int, actions: int, *, duelling: bool) -> nn.Module:
    """Returns the head that gives Q [..., A]: duelling streams, or one layer (Mnih et al. 2015).

    Q starts near 0 for every action, since targets take the largest: with PyTorch's start they
    would first learn the spread of random numbers. It does not start as near as a policy's logits:
    a torso's gradients shrink with the scale, and must stay above Adam's epsilon. Hidden layers
    start as torsos do, for the same reason (`torsos.ConvTorso`).
    """
    if duelling:
        return DuellingHead(features, actions)
    return linear_head(features, actions, scale=_ACTION_VALUE_SCALE)


def linear_head(inputs: int, outputs: int, *, scale: float, bias: bool = True) -> OutputLayer:
    """An output layer with orthogonal weight of the given scale and, if any, zero bias."""
    return orthogonal(OutputLayer(inputs, outputs, bias=bias), scale=scale)


def orthogonal(layer: Layer, *, scale: float) -> Layer:
    """Starts a layer with an orthogonal weight of the given scale and, if any, zero bias."""
    nn.init.orthogonal_(layer.weight, scale)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
