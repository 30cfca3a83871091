"""Generalised advantage estimation.

Source: Schulman et al. 2016, "High-dimensional continuous control using generalized advantage
estimation" (arXiv:1506.02438), equation 16.
Shape suffixes: T = unroll steps, U = T + 1 (the last row only bootstraps), B = unrolls.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from headrace.ops.returns import discounted_sum


class GaeTargets(NamedTuple):
    """Constants of one unroll: no gradient flows through them."""

    value_TB: Tensor  # [T, B] what the value head should predict: the TD(lambda) return
    advantage_TB: Tensor  # [T, B]


@torch.no_grad()
def gae_targets(
    reward_TB: Tensor, discount_TB: Tensor, value_UB: Tensor, *, lambda_: float
) -> GaeTargets:
    """Weighs the advantages over 1, 2, … steps by powers of lambda.

    Computes in float32, or in float64 where an input is float64.

    Args:
        reward_TB: transformed reward; where the step was truncated, plus gamma times the bootstrap.
        discount_TB: gamma, or 0 where the episode ended at this step, terminated or truncated.
        value_UB: estimates of the policy that acted, in the unit of the reward.
        lambda_: 0 trusts the values (one step), 1 the rewards (the whole unroll).
    """
    dtype = reduce(
        torch.promote_types, (x.dtype for x in (reward_TB, discount_TB, value_UB)), torch.float32
    )
    reward_TB, discount_TB, value_UB = (x.to(dtype) for x in (reward_TB, discount_TB, value_UB))
    value_TB, next_value_TB = value_UB[:-1], value_UB[1:]
    delta_TB = reward_TB + discount_TB * next_value_TB - value_TB
    advantage_TB = discounted_sum(delta_TB, lambda_ * discount_TB)
    return GaeTargets(advantage_TB + value_TB, advantage_TB)
