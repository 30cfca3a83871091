"""Running moments of a stream that comes in batches, and division by them.

Source of the merge: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for
computing sample variances". Moments are float64: a mean over 10^9 rows moves by less than float32
can hold.

Shape suffixes: N = rows; features of any shape, written `...`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headrace.algorithms.base import ALONE, Learners

LIMIT = 10.0
"""Normalised numbers are clipped to this on both sides, as in Huang et al. 2022, "The 37
implementation details of proximal policy optimization", for continuous actions."""
_EPSILON = 1e-8
_EXACT_ROWS = (
    256  # sums of so many squares of bytes are whole numbers below 2**24: exact in float32
)


class Moments(NamedTuple):
    """Moments of all rows seen so far."""

    total: Tensor  # [] float64 number of rows
    mean: Tensor  # [...] float64
    variance: Tensor  # [...] float64, of the population: divided by the total


def no_moments(shape: tuple[int, ...], device: torch.device | None = None) -> Moments:
    """Moments of nothing, under which `normalized` is all but the identity."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    mean = torch.zeros(shape, dtype=torch.float64, device=device)
    return Moments(total, mean, torch.ones_like(mean))


def merged(moments: Moments, rows: Tensor, learners: Learners = ALONE) -> Moments:
    """Moments of what was seen before and of `rows` [N, ...] of all learners together."""
    added = rows.shape[0] * learners.count
    mean, variance = moments_of(rows, learners)
    total = moments.total + added
    share = added / total
    apart = mean - moments.mean
    # Written as a mean of the two, which needs no sum of squares to overflow or to cancel.
    return Moments(
        total,
        moments.mean + share * apart,
        (1 - share) * moments.variance + share * variance + share * (1 - share) * apart.square(),
    )


def moments_of(rows: Tensor, learners: Learners = ALONE) -> tuple[Tensor, Tensor]:
    """Mean and variance (divided by the count) [...] of `rows` [N, ...] of all learners together.

    Both are float64. Learners have as many rows each; what they exchange is means of squares.
    """
    if rows.dtype == torch.uint8:
        mean, variance = _moments_of_bytes(rows)
    else:
        wide = rows.double()
        mean, variance = wide.mean(dim=0), wide.var(dim=0, correction=0)
    if learners.count == 1:
        return mean, variance
    shared = torch.stack((mean, variance + mean.square()))
    learners.average([shared])
    return shared[0], (shared[1] - shared[0].square()).clamp(min=0.0)


def _moments_of_bytes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """As `moments_of`, of uint8: exact sums, at a tenth of the time of float64."""
    total = torch.zeros(rows.shape[1:], dtype=torch.float64, device=rows.device)
    squares = torch.zeros_like(total)
    for part in torch.split(rows, _EXACT_ROWS):
        numbers = part.float()
        total += numbers.sum(dim=0)
        squares += numbers.square_().sum(dim=0)
    mean = total / rows.shape[0]
    return mean, (squares / rows.shape[0] - mean.square()).clamp(min=0.0)


def normalized(x: Tensor, moments: Moments) -> Tensor:
    """Returns (x - mean) / deviation in float32, clipped to +-LIMIT."""
    return ((x.float() - moments.mean.float()) / deviation(moments)).clamp(-LIMIT, LIMIT)


def deviation(moments: Moments) -> Tensor:
    """Standard deviation in float32; 1 before anything was seen."""
    return (moments.variance + _EPSILON).sqrt().float()
