"""Losses of actor-critic learners: means over steps and unrolls, never sums.

Shape suffixes: T = unroll steps, B = unrolls; any leading dimensions where there is no suffix.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_LOG_RATIO = 20.0
"""Ratios beyond are taken as this: `exp` has no float32 for 89, and its gradient there is NaN."""


_LARGEST_WEIGHT = 10.0  # a few actions must not say it all


def ratio_of(log_ratio: Tensor) -> Tensor:
    """Returns the ratio of two probabilities, any shape.

    It and its gradient are finite unless the log ratio is not: an action that could not have been
    taken is no large ratio but a mistake, which must show.
    """
    capped = log_ratio.clamp(max=LARGEST_LOG_RATIO)
    return torch.where(log_ratio == torch.inf, log_ratio, capped).exp()


def divergence(log_ratio: Tensor, weight: Tensor | None = None) -> Tensor:
    """Estimates KL(old, new), in nats, from actions of the old policy: a mean over all of them.

    r - 1 - log r is low in variance and never negative, unlike the mean of the log ratio (Schulman
    2020, "Approximating KL divergence").

    Args:
        log_ratio: log-probability of the action, new minus old.
        weight: of each action, where they are a third policy's: old over that.
    """
    estimate = ratio_of(log_ratio) - 1.0 - log_ratio
    if weight is None:
        return estimate.mean()
    weight = weight.clamp(max=_LARGEST_WEIGHT)
    return (weight * estimate).sum() / weight.sum().clamp(min=1e-12)


def policy_gradient_loss(log_prob_TB: Tensor, advantage_TB: Tensor) -> Tensor:
    """Loss with the policy gradient of Williams 1992; the advantage is a constant."""
    return -(log_prob_TB * advantage_TB.detach()).mean()


def value_loss(value_TB: Tensor, target_TB: Tensor) -> Tensor:
    """Half of the mean squared error; the target is a constant."""
    return 0.5 * (target_TB.detach() - value_TB).square().mean()


def clipped_surrogate_loss(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """PPO's objective with a minus (Schulman et al. 2017, arXiv:1707.06347, equation 7).

    Args:
        log_ratio: log-probability of the action, learner minus behaviour.
        advantage: a constant.
        clip_range: how far the ratio may leave 1 before the action's gradient stops; it stops only
            where going on would gain.
    """
    ratio, advantage = ratio_of(log_ratio), advantage.detach()
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return -torch.minimum(ratio * advantage, clipped * advantage).mean()


def clipped_value_loss(
    value: Tensor, target: Tensor, behaviour_value: Tensor, clip_range: float
) -> Tensor:
    """`value_loss` whose gradient stops where the value has moved far towards its target.

    Source: Huang et al. 2022, "The 37 implementation details of proximal policy optimization".

    Args:
        value: estimates that learn.
        target: a constant.
        behaviour_value: estimates before the update; a constant.
        clip_range: how far a value may move, in its own unit.
    """
    target, behaviour_value = target.detach(), behaviour_value.detach()
    moved = behaviour_value + (value - behaviour_value).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((value - target).square(), (moved - target).square()).mean()


def entropy_cost(parameter: Tensor, speed: float) -> Tensor:
    """Weight of the entropy that is learned, alpha = exp(speed * parameter), as in SEED RL.

    Args:
        parameter: learned scalar, log(initial cost) / speed at the start. Bound it after each step
            of the optimiser: a clamp in here would have no gradient beyond its edge.
        speed: how fast alpha follows for a given learning rate; SEED RL: 10 for V-trace, 1 for SAC.
    """
    return (speed * parameter).exp()


def entropy_cost_loss(cost: Tensor, entropy: Tensor, target_entropy: float) -> Tensor:
    """Loss that raises `cost` while the mean `entropy` is below its target, in nats.

    Minimised in the scalar only: the entropy is a constant here.
    """
    return cost * (entropy.detach() - target_entropy)
