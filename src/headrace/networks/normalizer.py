"""Normalisation of observations by what was seen so far, as part of the model.

Moments are buffers, so that they go wherever weights go: to the server, to workers, into
checkpoints, to `headrace.load`.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from headrace.algorithms.base import ALONE, Learners
from headrace.ops.normalization import Moments, merged, no_moments, normalized


@runtime_checkable
class Observer(Protocol):
    """A part of a network, or a network, that keeps statistics of what it was shown."""

    def observe(self, frames: Tensor) -> None:
        """Merges single frames [..., *observation] as the environment gave them."""


class ObservationNormalizer(nn.Module):
    """Subtracts the mean and divides by the deviation of every feature of one frame.

    Before anything was observed it is the identity, clipped.
    """

    total: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        """Takes the shape of one frame."""
        super().__init__()
        self.learners: Learners = ALONE  # whose frames are observed together; see `Algorithm`
        for name, value in no_moments(shape)._asdict().items():
            self.register_buffer(name, value)

    def forward(self, frames: Tensor) -> Tensor:
        """Normalises frames [..., *shape]: statistics are the same for all frames of a stack."""
        return normalized(frames, self._moments())

    @torch.no_grad()
    def observe(self, frames: Tensor) -> None:
        """Merges frames [..., *shape] into the statistics, in place."""
        rows = frames.reshape(-1, *self.mean.shape)
        new = merged(self._moments(), rows, self.learners)
        for buffer, value in zip(self._moments(), new, strict=True):
            buffer.copy_(value)

    def _moments(self) -> Moments:
        return Moments(self.total, self.mean, self.variance)


def frame_normalizer(space: gym.spaces.Box, *, wanted: bool) -> ObservationNormalizer | None:
    """Returns what normalises frames of `space`, where it is wanted and they are floats."""
    if wanted and np.issubdtype(space.dtype, np.floating):
        return ObservationNormalizer(space.shape)
    return None
