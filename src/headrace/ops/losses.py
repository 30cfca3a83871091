"""Losses of actor-critic learners: means over steps and unrolls, never sums.

Shape suffixes: T = unroll steps, B = unrolls, A = actions.
"""

from __future__ import annotations

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
