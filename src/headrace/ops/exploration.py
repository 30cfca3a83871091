"""How much each environment explores, and how: epsilon-greedily.

Source of the ladder: Horgan et al. 2018, "Distributed Prioritized Experience Replay" (Ape-X,
arXiv:1803.00933), section 4.1.
Shape suffixes: N = environments, A = actions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headrace.ops.distributions import log_prob, masked_logits, sample


class Choice(NamedTuple):
    """What was done, and what would have been best."""

    action_N: Tensor  # [N] int64
    log_prob_N: Tensor  # [N] of `action_N`, in nats
    best_N: Tensor  # [N] int64 the first of the best actions that are allowed


def epsilon_ladder(num_envs: int, *, base: float = 0.4, power: float = 7.0) -> Tensor:
    """Returns base^(1 + power i / (N - 1)) for i = 0 to N - 1, float32 [num_envs], on the CPU.

    One environment has the first rung, `base`: the formula divides by zero there.

    Args:
        num_envs: N.
        base: share of random actions of the environment that explores most.
        power: the last environment has base^(1 + power).

    Raises:
        ValueError: `num_envs` is less than 1.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, not {num_envs}")
    rung = torch.arange(num_envs, dtype=torch.float64) / max(1, num_envs - 1)
    return torch.pow(base, 1.0 + power * rung).float()


def epsilon_greedy(
    value_NA: Tensor,
    epsilon: float | Tensor | None,
    *,
    mask_NA: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Choice:
    """Takes the action of the highest value, but for a share `epsilon` of random ones.

    Never waits for the device, and gives a valid index even where values are NaN.

    Args:
        value_NA: values of the actions.
        epsilon: one share for all, or one for each, [N]; None for 0 without drawing anything.
        mask_NA: bool, what is allowed; a row that allows nothing allows all.
        generator: of the draws.
    """
    alike_NA = torch.zeros_like(value_NA)
    if mask_NA is not None:
        value_NA, alike_NA = masked_logits(value_NA, mask_NA), masked_logits(alike_NA, mask_NA)
    best_N = value_NA.argmax(dim=-1)
    if epsilon is None:
        return Choice(best_N, torch.zeros_like(value_NA[:, 0]), best_N)
    draw_N = torch.rand(len(best_N), device=best_N.device, generator=generator)
    action_N = torch.where(draw_N < epsilon, sample(alike_NA, generator), best_N)
    prob_N = epsilon * log_prob(alike_NA, action_N).exp() + (1.0 - epsilon) * (action_N == best_N)
    return Choice(action_N, prob_N.log(), best_N)
