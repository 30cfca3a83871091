"""Returns over n steps and the value that lies behind them.

Source: Sutton and Barto 2018, "Reinforcement Learning: An Introduction", section 7.1.
Shape suffixes: T = steps by action, U = T + 1 (the last row only bootstraps), B = sequences.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


@torch.no_grad()
def n_step_targets(
    reward_TB: Tensor, discount_TB: Tensor, value_UB: Tensor, *, steps: int
) -> Tensor:
    """Returns y_t = r_t + d_t r_{t+1} + … + (d_t … d_{t+n-1}) V_{t+n}, [T, B], constants.

    The last n - 1 returns shrink: they end at V_T, the only value that is left. Computes in
    float32, or in float64 where an input is float64.

    Args:
        reward_TB: transformed reward; where the step was truncated, plus gamma times the bootstrap.
        discount_TB: gamma, or 0 where the episode ended at this step, terminated or truncated.
        value_UB: V, in the unit of the reward.
        steps: n, any number from 1; from T on, every return reaches the last row.

    Raises:
        ValueError: `steps` is less than 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    inputs = (reward_TB, discount_TB, value_UB)
    dtype = reduce(torch.promote_types, (x.dtype for x in inputs), torch.float32)
    reward_TB, discount_TB, value_UB = (x.to(dtype) for x in inputs)
    last_1B = value_UB[-1:]
    # A return over k + 1 steps is one step and the return over k from the next; V is that over 0.
    target_TB = torch.addcmul(reward_TB, discount_TB, value_UB[1:])
    for _ in range(min(steps, len(reward_TB)) - 1):
        next_TB = torch.cat((target_TB[1:], last_1B))
        target_TB = torch.addcmul(reward_TB, discount_TB, next_TB)
    return target_TB
