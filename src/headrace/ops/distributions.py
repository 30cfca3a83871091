"""Policies as functions of a network's raw output: what it says, and what is done with it.

An algorithm knows one small protocol, `Distribution`, and asks `make_distribution` for the kind
that an action space needs. Parameters are a tensor, never an object with state, so that they can be
sliced, masked and stored. Nothing here waits for the device.

Shape suffixes: A = choices of one or of all discrete components, D = components; any leading
dimensions, written `...`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import gymnasium as gym
import torch
from torch import Tensor

from headrace.ops.squashed_normal import SquashedNormal

_FORBIDDEN = -1e30
"""Logit of a forbidden action: finite, so that probability 0 times its log is 0 and not NaN."""
_LOWEST_ALLOWED = -1e20
"""Allowed logits are raised to this, so that none, not even -inf, lies below a forbidden one."""


class Distribution(Protocol):
    """A kind of policy."""

    @property
    def num_parameters(self) -> int:
        """Numbers that a network gives per row."""

    @property
    def encoded_size(self) -> int:
        """Numbers that `encode` gives per row."""

    def masked(self, parameters: Tensor, mask: Tensor | None) -> Tensor:
        """Forbids what `mask` [..., A] leaves out; all is allowed where it leaves out all."""

    def sample(self, parameters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draws one action per row; a valid one even where parameters are NaN."""

    def greedy(self, parameters: Tensor) -> Tensor:
        """Takes the likeliest action (continuous: the one at the mean)."""

    def uniform(
        self,
        parameters: Tensor,
        *,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws from all that is allowed alike; `parameters` give the shape and the device."""

    def log_prob(self, parameters: Tensor, action: Tensor) -> Tensor:
        """Log-probability, or log-density, per row in nats."""

    def entropy(self, parameters: Tensor) -> Tensor:
        """Entropy per row in nats; differential entropy where actions are continuous."""

    def to_env(self, action: Tensor) -> Tensor | None:
        """What the environment is told; None where that is `action` itself."""

    def encode(self, previous_action: Tensor) -> Tensor:
        """Features [..., E] of a previous action, all zero where there was none."""


@dataclass(frozen=True, slots=True)
class Categorical:
    """One choice of `choices`; parameters are logits [..., A], actions int64 [...]."""

    choices: int

    @property
    def num_parameters(self) -> int:
        """A."""
        return self.choices

    @property
    def encoded_size(self) -> int:
        """A."""
        return self.choices

    def masked(self, parameters: Tensor, mask: Tensor | None) -> Tensor:
        """Returns logits that make what `mask` [..., A] leaves out impossible."""
        return parameters if mask is None else masked_logits(parameters, mask)

    def sample(self, parameters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """See `sample`."""
        return sample(parameters, generator)

    def greedy(self, parameters: Tensor) -> Tensor:
        """See `greedy`."""
        return greedy(parameters)

    def uniform(
        self,
        parameters: Tensor,
        *,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws from the allowed choices alike."""
        return sample(self.masked(torch.zeros_like(parameters), mask), generator)

    def log_prob(self, parameters: Tensor, action: Tensor) -> Tensor:
        """See `log_prob`."""
        return log_prob(parameters, action)

    def entropy(self, parameters: Tensor) -> Tensor:
        """See `entropy`."""
        return entropy(parameters)

    def to_env(self, action: Tensor) -> None:
        """The environment is told the action itself."""

    def encode(self, previous_action: Tensor) -> Tensor:
        """One-hot [..., A]; zeros for -1, the start of an episode."""
        return one_hot(previous_action, self.choices)


@dataclass(frozen=True, slots=True)
class MultiCategorical:
    """Independent choices; parameters are all logits side by side [..., A], actions [..., D]."""

    choices: tuple[int, ...]

    @property
    def num_parameters(self) -> int:
        """A: the choices of all components."""
        return sum(self.choices)

    @property
    def encoded_size(self) -> int:
        """A."""
        return sum(self.choices)

    def masked(self, parameters: Tensor, mask: Tensor | None) -> Tensor:
        """Masks each component by itself; `mask` [..., A] is laid out as the logits are."""
        if mask is None:
            return parameters
        pairs = zip(self._split(parameters), self._split(mask), strict=True)
        return torch.cat([masked_logits(logits, allowed) for logits, allowed in pairs], dim=-1)

    def sample(self, parameters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draws every component by itself."""
        return torch.stack([sample(x, generator) for x in self._split(parameters)], dim=-1)

    def greedy(self, parameters: Tensor) -> Tensor:
        """Takes the likeliest choice of every component."""
        return torch.stack([greedy(x) for x in self._split(parameters)], dim=-1)

    def uniform(
        self,
        parameters: Tensor,
        *,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws every component from its allowed choices alike."""
        return self.sample(self.masked(torch.zeros_like(parameters), mask), generator)

    def log_prob(self, parameters: Tensor, action: Tensor) -> Tensor:
        """Sum over the components."""
        pairs = zip(self._split(parameters), action.unbind(-1), strict=True)
        return torch.stack([log_prob(x, chosen) for x, chosen in pairs]).sum(dim=0)

    def entropy(self, parameters: Tensor) -> Tensor:
        """Sum over the components, which are independent."""
        return torch.stack([entropy(x) for x in self._split(parameters)]).sum(dim=0)

    def to_env(self, action: Tensor) -> None:
        """The environment is told the action itself."""

    def encode(self, previous_action: Tensor) -> Tensor:
        """One-hots side by side [..., A]; zeros for -1."""
        pairs = zip(previous_action.unbind(-1), self.choices, strict=True)
        return torch.cat([one_hot(chosen, count) for chosen, count in pairs], dim=-1)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x, list(self.choices), dim=-1)


def make_distribution(
    space: gym.spaces.Discrete | gym.spaces.MultiDiscrete | gym.spaces.Box,
) -> Distribution:
    """Returns the kind of policy that the actions of an `EnvSpec` need."""
    if isinstance(space, gym.spaces.Discrete):
        return Categorical(int(space.n))
    if isinstance(space, gym.spaces.MultiDiscrete):
        return MultiCategorical(tuple(int(count) for count in space.nvec))
    return SquashedNormal(tuple(space.low.tolist()), tuple(space.high.tolist()))


def sample(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws one action per row by the Gumbel-max trick (Gumbel 1954): argmax of logits plus noise.

    Never waits for the device, and gives a valid index even where logits are NaN: such an action
    must not hang an environment before the learner reports that the run diverged.
    """
    logits = logits.float()
    # Minus the log of an exponential variate is Gumbel noise.
    noise = torch.empty_like(logits).exponential_(generator=generator).log_()
    return (logits - noise).argmax(dim=-1)


def greedy(logits: Tensor) -> Tensor:
    """Takes the most likely action, the first of equals."""
    return logits.argmax(dim=-1)


def log_prob(logits: Tensor, action: Tensor) -> Tensor:
    """Log-probability of `action` [...] under `logits` [..., A], in nats."""
    return logits.log_softmax(dim=-1).gather(-1, action.unsqueeze(-1)).squeeze(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy per row, in nats."""
    log_prob_A = logits.log_softmax(dim=-1)
    return -(log_prob_A.exp() * log_prob_A).sum(dim=-1)


def masked_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """Returns logits under which what `mask` [..., A] leaves out has probability 0, exactly.

    Rows whose mask leaves out all are as if there were none: an environment that says so at the end
    of an episode must not stop the run.
    """
    allowed = mask | ~mask.any(dim=-1, keepdim=True)
    return torch.where(allowed, logits.clamp(min=_LOWEST_ALLOWED), _FORBIDDEN)


def one_hot(index: Tensor, count: int) -> Tensor:
    """Float32 [..., count]; zeros where `index` [...] is -1. Unlike `F.one_hot` it never waits."""
    return (index.unsqueeze(-1) == torch.arange(count, device=index.device)).float()
