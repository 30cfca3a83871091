"""Losses of soft actor-critic, as functions of what networks said.

Source: Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications", arXiv:1812.05905,
equations 5, 9 and 18. The least of N critics stands for Q, as there for N = 2.

Shape suffixes: N = critics, B = rows of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def soft_targets(
    reward_B: Tensor, discount_B: Tensor, next_q_NB: Tensor, next_log_prob_B: Tensor, alpha: Tensor
) -> Tensor:
    """Returns r + d (min Q(s', a') - alpha log pi(a' | s')), [B], for an a' that was drawn.

    Args:
        reward_B: of the steps in between, discounted.
        discount_B: gamma to the power of their number; 0 where the episode terminated.
        next_q_NB: of the target critics.
        next_log_prob_B: of a', in nats.
        alpha: temperature.
    """
    soft_value_B = next_q_NB.amin(dim=0) - alpha * next_log_prob_B
    return torch.addcmul(reward_B, discount_B, soft_value_B)


def critics_loss(q_NB: Tensor, target_B: Tensor, weight_B: Tensor) -> Tensor:
    """Half the weighted squared error, mean over rows, sum over critics (equation 5)."""
    return 0.5 * (weight_B * (q_NB - target_B).square()).mean(dim=1).sum()


def soft_policy_loss(q_NB: Tensor, log_prob_B: Tensor, alpha: Tensor) -> Tensor:
    """Mean of alpha log pi(a | s) - min Q(s, a), for actions that have a gradient (equation 9)."""
    return (alpha * log_prob_B - q_NB.amin(dim=0)).mean()


def temperature_loss(log_alpha: Tensor, log_prob_B: Tensor, target_entropy: float) -> Tensor:
    """Mean of -alpha (log pi(a | s) + target entropy), whose step raises alpha below the target.

    Log-probabilities are constants (equation 18).
    """
    return -(log_alpha.exp() * (log_prob_B.detach() + target_entropy)).mean()


@torch.no_grad()
def move_towards(target: Sequence[Tensor], online: Sequence[Tensor], tau: float) -> None:
    """Sets target to (1 - tau) target + tau online, in place; 1 copies."""
    torch._foreach_lerp_(list(target), list(online), tau)
