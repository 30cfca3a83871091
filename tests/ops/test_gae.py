"""GAE against its definition: an explicit sum over the advantages of 1, 2, … steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headrace.ops.gae import gae_targets
from headrace.ops.returns import returns_so_far

T, B = 7, 4


def example() -> tuple[Tensor, Tensor, Tensor]:
    reward_TB, value_UB = torch.randn(T, B).double(), torch.randn(T + 1, B).double()
    discount_TB = torch.full((T, B), 0.9).double()
    discount_TB[2, 0] = discount_TB[0, 1] = discount_TB[T - 1, 2] = 0.0
    return reward_TB, discount_TB, value_UB


def by_definition(reward: Tensor, discount: Tensor, value: Tensor, lambda_: float) -> Tensor:
    """Equation 16: (1 - lambda) (A(1) + lambda A(2) + …), the rest of the weight on the longest."""
    advantage = torch.zeros_like(reward)
    for b in range(reward.shape[1]):
        for t in range(T):
            longest = T - t
            for k in range(1, longest + 1):
                total, weight = -value[t, b], torch.tensor(1.0).double()
                for i in range(k):
                    total = total + weight * reward[t + i, b]
                    weight = weight * discount[t + i, b]
                total = total + weight * value[t + k, b]
                share = lambda_ ** (k - 1) * ((1 - lambda_) if k < longest else 1.0)
                advantage[t, b] += share * total
    return advantage


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 0.95, 1.0])
def test_gae_is_its_definition(lambda_: float) -> None:
    reward_TB, discount_TB, value_UB = example()
    targets = gae_targets(reward_TB, discount_TB, value_UB, lambda_=lambda_)
    expected = by_definition(reward_TB, discount_TB, value_UB, lambda_)
    torch.testing.assert_close(targets.advantage_TB, expected)
    torch.testing.assert_close(targets.value_TB, expected + value_UB[:-1])


def test_nothing_crosses_an_end() -> None:
    reward_TB, discount_TB, value_UB = example()
    before = gae_targets(reward_TB, discount_TB, value_UB, lambda_=0.95).advantage_TB
    reward_TB[3:, 0] += 100.0
    value_UB[3:, 0] += 100.0
    after = gae_targets(reward_TB, discount_TB, value_UB, lambda_=0.95).advantage_TB
    torch.testing.assert_close(after[:3, 0], before[:3, 0], rtol=0, atol=0)
    assert (after[3:, 0] != before[3:, 0]).all()


def test_targets_are_constants() -> None:
    reward_TB, discount_TB, value_UB = example()
    value_UB.requires_grad_()
    targets = gae_targets(reward_TB, discount_TB, value_UB, lambda_=0.9)
    assert not targets.advantage_TB.requires_grad
    assert not targets.value_TB.requires_grad


def test_returns_go_on_from_unroll_to_unroll_and_start_anew_after_an_end() -> None:
    reward = torch.randn(2 * T, B).double()
    discount = torch.full((2 * T, B), 0.8).double()
    discount[2, 0] = discount[T - 1, 1] = discount[T, 2] = 0.0
    expected = torch.zeros(2 * T, B).double()
    for b in range(B):
        running = 0.0
        for t in range(2 * T):
            running = reward[t, b] + running
            expected[t, b] = running
            running = running * discount[t, b]
    carried = torch.zeros(B).double()
    first, carried = returns_so_far(reward[:T], discount[:T], carried)
    second, _ = returns_so_far(reward[T:], discount[T:], carried)
    torch.testing.assert_close(torch.cat((first, second)), expected)
