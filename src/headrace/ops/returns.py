"""Discounted sums along an unroll, forwards and backwards.

Shape suffixes: T = unroll steps, B = unrolls.
"""

from __future__ import annotations

import torch
from torch import Tensor


def discounted_sum(x_TB: Tensor, decay_TB: Tensor) -> Tensor:
    """Solves y_t = x_t + decay_t y_{t+1} with y_T = 0, one fused operation a step."""
    total_B = torch.zeros_like(x_TB[0])
    backwards = []
    for x_B, decay_B in zip(reversed(x_TB.unbind()), reversed(decay_TB.unbind()), strict=True):
        total_B = torch.addcmul(x_B, decay_B, total_B)
        backwards.append(total_B)
    return torch.stack(backwards[::-1])


def returns_so_far(
    reward_TB: Tensor, discount_TB: Tensor, before_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Discounted sum of the rewards earned so far in an episode, R_t = r_t + gamma R_{t-1}.

    Args:
        reward_TB: rewards by action.
        discount_TB: gamma, or 0 where the episode ended at this step: the next starts from nothing.
        before_B: gamma times the return before the first step, as the last call gave it.

    Returns:
        R [T, B], and what to hand to the next call.
    """
    returns = []
    for reward_B, discount_B in zip(reward_TB.unbind(), discount_TB.unbind(), strict=True):
        return_B = reward_B + before_B
        returns.append(return_B)
        before_B = discount_B * return_B
    return torch.stack(returns), before_B
