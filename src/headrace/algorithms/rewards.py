"""From raw rewards and ends of episodes to what a target is computed from.

Shape suffixes: T = unroll steps, B = unrolls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headrace.algorithms.base import ALONE, Learners
from headrace.ops.normalization import Moments, deviation, merged, no_moments
from headrace.ops.returns import returns_so_far
from headrace.ops.rewards import RewardTransform, transform_reward
from headrace.records import Batch


class RewardRule:
    """Scales and transforms rewards; keeps the running deviation of returns where that is asked."""

    def __init__(
        self,
        transform: RewardTransform,
        *,
        scale: float,
        discount: float,
        batch_unrolls: int,
        device: torch.device,
    ) -> None:
        """Takes the settings.

        Args:
            transform: What is done to a scaled reward.
            scale: Factor on raw rewards, before the transform (and so before any clip).
            discount: gamma.
            batch_unrolls: B.
            device: Of the batches.
        """
        self._transform = transform
        self._scale = scale
        self._discount = discount
        self.learners: Learners = ALONE
        """Whose rewards are observed together."""
        self._moments: Moments | None = None
        if transform == "normalize":
            self._moments = no_moments((), device)
            self._return_B = torch.zeros(batch_unrolls, dtype=torch.float64, device=device)

    def observe(self, batch: Batch) -> None:
        """Takes the rewards of a batch, each once, into the running deviation of returns.

        Returns go on from one batch to the next, column by column. Where every batch has one unroll
        of every environment, in order, they are the environments' own, as published; otherwise
        columns change places among environments, which leaves the spread of returns what it is.
        """
        if self._moments is None:
            return
        discount_TB = self._discount * (~(batch.terminated | batch.truncated)).double()
        return_TB, self._return_B = returns_so_far(
            self._scale * batch.reward.double(), discount_TB, self._return_B
        )
        self._moments = merged(self._moments, return_TB.flatten(), self.learners)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns transformed rewards, with what lies past the clock, and discounts, both [T, B].

        A discount is 0 where the episode ended. Past the clock it would have gone on: its value is
        what the server saw there, already in the unit of transformed rewards.
        """
        std = None if self._moments is None else deviation(self._moments)
        reward_TB = transform_reward(self._scale * batch.reward, self._transform, return_std=std)
        ended_TB = batch.terminated | batch.truncated
        discount_TB = self._discount * (~ended_TB).float()
        return reward_TB + self._discount * batch.bootstrap, discount_TB

    def state_dict(self) -> dict[str, Any]:
        """Returns the running deviation; empty where none is kept."""
        if self._moments is None:
            return {}
        return {**self._moments._asdict(), "return": self._return_B}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        if self._moments is not None:
            device = self._return_B.device
            self._moments = Moments(*(state[name].to(device) for name in Moments._fields))
            if state["return"].shape == self._return_B.shape:
                self._return_B.copy_(state["return"])
            else:  # of another number of learners: each has other columns now
                self._return_B.zero_()
