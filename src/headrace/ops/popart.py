"""PopArt: values are learned in units of their own spread, and outputs stay when those units move.

Source: van Hasselt et al. 2016, "Learning values across many orders of magnitude",
arXiv:1602.07714; per task, as in Hessel et al. 2018, "Multi-task deep reinforcement learning with
PopArt", arXiv:1809.04474, section 3. The output layer says n = w f + b; the value is
deviation n + mean.

Moments are float64: a deviation of 1 beside a mean of 10 000 is lost in a float32 square.

Shape suffixes: N = tasks, F = features; targets of any shape.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headrace.algorithms.base import ALONE, Learners


class Statistics(NamedTuple):
    """Moments of the targets of each task."""

    mean_N: Tensor  # [N] float64
    square_N: Tensor  # [N] float64, the mean of their squares


def no_statistics(tasks: int) -> Statistics:
    """Mean 0 and deviation 1, before anything was seen."""
    mean_N = torch.zeros(tasks, dtype=torch.float64)
    return Statistics(mean_N, torch.ones_like(mean_N))


@torch.no_grad()
def updated(
    statistics: Statistics,
    target: Tensor,
    task: Tensor,
    *,
    step: float | Tensor,
    learners: Learners = ALONE,
) -> Statistics:
    """Moves the moments of every task that is present one step towards those of its targets.

    Args:
        statistics: so far.
        target: [...] of values, in the unit of the rewards.
        task: int64 of the same shape, or one that broadcasts to it: the number of each target's
            task, from 0 to N - 1.
        step: how far, from 0 to 1; one for all, or one for each task, [N].
        learners: whose targets are taken together; all get the same bits.
    """
    target, task = target.double().flatten(), task.expand_as(target).flatten()
    sums_3N = torch.zeros(3, len(statistics.mean_N), dtype=torch.float64, device=target.device)
    sums_3N.index_add_(1, task, torch.stack((torch.ones_like(target), target, target.square())))
    if learners.count > 1:
        learners.average([sums_3N])
    count_N, *sums = sums_3N
    is_present_N = count_N > 0
    new = (
        torch.where(is_present_N, old_N + step * (sum_N / count_N - old_N), old_N)
        for old_N, sum_N in zip(statistics, sums, strict=True)
    )
    return Statistics(*new)


def deviation(statistics: Statistics, *, low: float = 1e-4, high: float = 1e6) -> Tensor:
    """Standard deviation [N] float64 of each task's targets, from `low` to `high`."""
    variance_N = statistics.square_N - statistics.mean_N.square()
    return variance_N.clamp(min=0.0).sqrt().clamp(low, high)


@torch.no_grad()
def preserved(
    weight_NF: Tensor, bias_N: Tensor, old: Statistics, new: Statistics
) -> tuple[Tensor, Tensor]:
    """Returns the output layer that says by `new` statistics what the given one says by `old`.

    In the dtypes of what is given; the arithmetic is float64.
    """
    old_N, new_N = deviation(old), deviation(new)
    weight = weight_NF.double() * (old_N / new_N).unsqueeze(-1)
    bias = (old_N * bias_N.double() + old.mean_N - new.mean_N) / new_N
    return weight.to(weight_NF.dtype), bias.to(bias_N.dtype)
