"""Losses of actor-critic learners: means over steps and unrolls, never sums.

Shape suffixes: T = unroll steps, B = unrolls, A = actions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headrace.ops import distributions


def policy_gradient_loss(log_prob_TB: Tensor, advantage_TB: Tensor) -> Tensor:
    """Loss with the policy gradient of Williams 1992; the advantage is a constant."""
    return -(log_prob_TB * advantage_TB.detach()).mean()


def value_loss(value_TB: Tensor, target_TB: Tensor) -> Tensor:
    """Half of the mean squared error; the target is a constant."""
    return 0.5 * (target_TB.detach() - value_TB).square().mean()


def mean_entropy(logits_TBA: Tensor) -> Tensor:
    """Entropy of the policy in nats, to be raised: it enters the loss with a minus."""
    return distributions.entropy(logits_TBA).mean()


def entropy_cost(parameter: Tensor, speed: float) -> Tensor:
    """Weight of the entropy that is learned, alpha = exp(speed * parameter), as in SEED RL.

    Args:
        parameter: learned scalar; `entropy_cost_parameter` gives its start.
        speed: how fast alpha follows for a given learning rate; SEED RL: 10 for V-trace, 1 for SAC.
    """
    return (speed * parameter).exp()


def entropy_cost_parameter(initial_cost: float, speed: float) -> float:
    """Start of the learned scalar at which `entropy_cost` gives `initial_cost`."""
    return math.log(initial_cost) / speed


def entropy_cost_loss(cost: Tensor, entropy: Tensor, target_entropy: float) -> Tensor:
    """Loss that raises `cost` while the mean `entropy` is below its target, in nats.

    Minimised in the scalar only: the entropy is a constant here.
    """
    return cost * (entropy.detach() - target_entropy)


@torch.no_grad()
def clamp_entropy_parameter_(parameter: Tensor, speed: float) -> None:
    """Keeps alpha within exp(-20) and exp(20), in place, after each step of the optimiser.

    A clamp inside `entropy_cost` would have no gradient beyond its edge and never come back.
    """
    parameter.clamp_(-20.0 / speed, 20.0 / speed)
