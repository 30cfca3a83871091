"""Losses of soft actor-critic beside sums written out, and which way a target moves."""

from __future__ import annotations

import math

import pytest
import torch

from headrace.ops.soft_values import (
    critics_loss,
    move_towards,
    soft_policy_loss,
    soft_targets,
    temperature_loss,
)

N, B = 3, 5
ALPHA = 0.3


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_targets_and_losses_are_the_papers() -> None:
    reward, log_prob, q = numbers(B, seed=0), numbers(B, seed=1), numbers(N, B, seed=2)
    discount = torch.tensor([0.9, 0.81, 0.0, 0.9, 1.0], dtype=torch.float64)
    weight, alpha = numbers(B, seed=3).abs(), torch.tensor(ALPHA, dtype=torch.float64)
    next_q = numbers(N, B, seed=4)
    target = soft_targets(reward, discount, next_q, log_prob, alpha)
    squares = policy = 0.0
    for b in range(B):
        value = min(next_q[n, b].item() for n in range(N)) - ALPHA * log_prob[b].item()
        y = reward[b].item() + discount[b].item() * value
        assert target[b].item() == pytest.approx(y, abs=1e-12)
        squares += sum(weight[b].item() * (q[n, b].item() - y) ** 2 / 2 for n in range(N)) / B
        policy += (ALPHA * log_prob[b].item() - min(q[n, b].item() for n in range(N))) / B
    assert critics_loss(q, target, weight).item() == pytest.approx(squares, abs=1e-12)
    assert soft_policy_loss(q, log_prob, alpha).item() == pytest.approx(policy, abs=1e-12)


@pytest.mark.parametrize(("target_entropy", "rises"), [(2.0, True), (-2.0, False)])
def test_the_temperature_rises_where_entropy_is_below_its_target(
    target_entropy: float, rises: bool
) -> None:
    log_alpha = torch.tensor(math.log(ALPHA), dtype=torch.float64, requires_grad=True)
    log_prob = numbers(B, seed=5).requires_grad_()
    loss = temperature_loss(log_alpha, log_prob, target_entropy)
    # alpha E[H - target], equation 18
    entropy = -log_prob.mean().item()
    assert loss.item() == pytest.approx(ALPHA * (entropy - target_entropy), abs=1e-12)
    loss.backward()
    assert log_alpha.grad is not None
    assert (log_alpha.grad < 0) == rises
    assert log_prob.grad is None


def test_a_target_moves_to_what_learns_by_a_share_of_tau() -> None:
    target, online = [torch.zeros(3), torch.ones(2)], [torch.full((3,), 10.0), torch.ones(2)]
    move_towards(target, online, 0.1)
    assert target[0].tolist() == pytest.approx([1.0] * 3)
    move_towards(target, online, 0.1)
    assert target[0].tolist() == pytest.approx([1.9] * 3)
    assert online[0].tolist() == [10.0] * 3
    assert target[1].tolist() == [1.0] * 2
    move_towards(target, online, 1.0)
    assert torch.equal(target[0], online[0])
