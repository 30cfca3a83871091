"""Transforms of raw rewards; they belong to the learner, never to the environment."""

from __future__ import annotations

from typing import Literal, assert_never

import torch
from torch import Tensor

RewardTransform = Literal["none", "clip", "soft_asymmetric", "normalize"]

_NORMALIZED_LIMIT = 10.0


def transform_reward(
    reward: Tensor, mode: RewardTransform, *, return_std: Tensor | None = None
) -> Tensor:
    """Maps raw rewards to what the learner optimises.

    Args:
        reward: raw rewards, any shape.
        mode: "clip" to [-1, 1] (Mnih et al. 2015); "soft_asymmetric" is the "optimistic asymmetric
            clipping" that IMPALA used on DMLab-30: in [-1.5, 5], losses weigh 0.3 of wins. It is
            the published code, which divides by 5 inside the tanh; the paper's text does not.
            "normalize" divides by `return_std` and clips to [-10, 10], as PPO is run on MuJoCo
            (Huang et al. 2022, "The 37 implementation details of proximal policy optimization").
        return_std: for "normalize": running standard deviation of the discounted return.

    Raises:
        ValueError: mode "normalize" without `return_std`.
    """
    match mode:
        case "none":
            return reward
        case "clip":
            return reward.clamp(-1.0, 1.0)
        case "soft_asymmetric":
            squeezed = (reward / 5.0).tanh()
            return 5.0 * torch.where(reward < 0, 0.3 * squeezed, squeezed)
        case "normalize":
            if return_std is None:
                raise ValueError('reward_transform "normalize" needs the deviation of returns')
            return (reward / return_std).clamp(-_NORMALIZED_LIMIT, _NORMALIZED_LIMIT)
        case _:
            assert_never(mode)
