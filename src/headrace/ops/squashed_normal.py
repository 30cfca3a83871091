"""A normal variate per component, squashed by tanh into the bounds of the action.

Actions are kept as they are before the squash, u: log-densities then need no inverse of tanh, which
is lost where it rounds to 1. Densities are those of tanh(u) in [-1, 1], as in Haarnoja et al. 2018,
"Soft Actor-Critic" (arXiv:1801.01290), appendix C, so that settings do not depend on the unit in
which an environment counts; log(1 - tanh(u)^2) is written 2 (log 2 - u - softplus(-2 u)), which
neither overflows nor rounds to log 0.

Shape suffixes: D = components, Q = nodes of the quadrature; any leading dimensions, written `...`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_STD_RANGE = (-10.0, 2.0)
"""Logs of standard deviations are clamped to this, before the squash: from all but deterministic to
all but two-valued, at the two ends of the range (uniform is near log 0.87)."""
_NODES, _NODE_RANGE = 64, 5.5  # nodes of the quadrature, and the deviations that they cover
_UNIFORM_EDGE = 1.0 - 2.0**-20  # atanh(1) is infinite


@dataclass(frozen=True, slots=True)
class SquashedNormal:
    """Parameters are mean and log standard deviation side by side [..., 2 D]; actions float32."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def num_parameters(self) -> int:
        """2 D."""
        return 2 * len(self.low)

    @property
    def encoded_size(self) -> int:
        """D."""
        return len(self.low)

    def masked(self, parameters: Tensor, mask: Tensor | None) -> Tensor:
        """Returns `parameters`.

        Raises:
            ValueError: there is a mask; continuous actions have none.
        """
        if mask is not None:
            raise ValueError("continuous actions cannot be masked")
        return parameters

    def sample(self, parameters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draws actions before the squash; finite even where parameters are not."""
        mean = mean_and_log_std(parameters.float())[0]
        noise = torch.empty_like(mean).normal_(generator=generator)
        return self.placed(parameters.float(), noise).nan_to_num()

    def placed(self, parameters: Tensor, noise: Tensor) -> Tensor:
        """Makes actions before the squash of standard normal noise [..., D].

        They have a gradient: a sample written as a function of the parameters (Haarnoja et al.
        2018, equation 11).
        """
        mean, log_std = mean_and_log_std(parameters)
        return mean + log_std.exp() * noise

    def greedy(self, parameters: Tensor) -> Tensor:
        """The mean before the squash, which is the median after it."""
        return mean_and_log_std(parameters.float())[0].nan_to_num()

    def uniform(
        self,
        parameters: Tensor,
        *,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws what is uniform between the bounds after the squash."""
        like = mean_and_log_std(self.masked(parameters, mask).float())[0]
        squashed = torch.empty_like(like).uniform_(-1.0, 1.0, generator=generator)
        return unsquashed(squashed)

    def log_prob(self, parameters: Tensor, action: Tensor) -> Tensor:
        """Log-density of tanh(action), in nats, summed over components."""
        mean, log_std = mean_and_log_std(parameters)
        standard = (action - mean) * (-log_std).exp()
        normal = -0.5 * standard.square() - log_std - 0.5 * math.log(2.0 * math.pi)
        return (normal - log_slope(action)).sum(dim=-1)

    def entropy(self, parameters: Tensor) -> Tensor:
        """Differential entropy of tanh(action), in nats, summed over components.

        Entropy of the normal plus the mean log of the squash's slope. That mean has no closed form;
        it is a sum over fixed nodes, so that the gradient has no noise.
        """
        mean, log_std = mean_and_log_std(parameters)
        node_Q, weight_Q = _quadrature(mean.device, mean.dtype)
        action_Q = mean.unsqueeze(-1) + log_std.exp().unsqueeze(-1) * node_Q
        squash = (log_slope(action_Q) * weight_Q).sum(dim=-1)
        return (0.5 * math.log(2.0 * math.pi * math.e) + log_std + squash).sum(dim=-1)

    def to_env(self, action: Tensor) -> Tensor:
        """Returns low + (tanh(action) + 1) / 2 * (high - low), never outside by a rounding."""
        low, high = _bounds(self.low, self.high, action.device)
        # Written by centre and half width: high - low may be too large for float32.
        squashed = (0.5 * low + 0.5 * high) + (0.5 * high - 0.5 * low) * action.float().tanh()
        return torch.clamp(squashed, low, high)

    def encode(self, previous_action: Tensor) -> Tensor:
        """Features tanh(action); 0, the start of an episode, stays 0."""
        return previous_action.tanh()


def mean_and_log_std(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Splits [..., 2 D] into mean and log standard deviation, the latter clamped."""
    mean, log_std = parameters.chunk(2, dim=-1)
    return mean, log_std.clamp(*LOG_STD_RANGE)


def unsquashed(action: Tensor) -> Tensor:
    """Returns the u whose tanh is `action`, or the nearest to it that is finite."""
    return action.clamp(-_UNIFORM_EDGE, _UNIFORM_EDGE).atanh()


def log_slope(action: Tensor) -> Tensor:
    """Returns log(1 - tanh(action)^2), the log of how much the squash stretches."""
    return 2.0 * (math.log(2.0) - action - F.softplus(-2.0 * action))


# Kept per device: a copy from the host would wait, and cannot be part of a captured graph.
@functools.cache
def _quadrature(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Nodes and weights for means under the standard normal, by the trapezoidal rule.

    Off by 1e-4 nats at the widest policy, by 1e-6 below a deviation of e. As many nodes of
    Gauss-Hermite are off by 2e-2 and 7e-5: a wide policy makes of the squash's log slope a tent,
    which no polynomial fits.
    """
    node = torch.linspace(-_NODE_RANGE, _NODE_RANGE, _NODES, dtype=torch.float64)
    weight = (-0.5 * node.square()).softmax(dim=0)
    return node.to(device, dtype), weight.to(device, dtype)


@functools.cache
def _bounds(
    low: tuple[float, ...], high: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    return torch.tensor(low, device=device), torch.tensor(high, device=device)
