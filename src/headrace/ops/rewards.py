"""Transforms of raw rewards; they belong to the learner, never to the environment."""

from __future__ import annotations

from typing import Literal, assert_never

import torch
from torch import Tensor

RewardTransform = Literal["none", "clip", "soft_asymmetric"]


def transform_reward(reward: Tensor, mode: RewardTransform) -> Tensor:
    """Maps raw rewards to what the learner optimises.

    Args:
        reward: raw rewards, any shape.
        mode: "clip" to [-1, 1] (Mnih et al. 2015); "soft_asymmetric" is the "optimistic asymmetric
            clipping" that IMPALA used on DMLab-30: in [-1.5, 5], losses weigh 0.3 of wins. It is
            the published code, which divides by 5 inside the tanh; the paper's text does not.
    """
    match mode:
        case "none":
            return reward
        case "clip":
            return reward.clamp(-1.0, 1.0)
        case "soft_asymmetric":
            squeezed = (reward / 5.0).tanh()
            return 5.0 * torch.where(reward < 0, 0.3 * squeezed, squeezed)
        case _:
            assert_never(mode)
