import math

import pytest
import torch

from headrace.ops import losses


def rand(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=grad)


def test_policy_gradient_is_the_mean_of_scores_times_advantage() -> None:
    log_prob_TB, advantage_TB = rand(4, 3), rand(4, 3)
    losses.policy_gradient_loss(log_prob_TB, advantage_TB).backward()
    torch.testing.assert_close(log_prob_TB.grad, -advantage_TB.detach() / 12)
    assert advantage_TB.grad is None


def test_value_loss_pulls_the_value_and_leaves_the_target() -> None:
    value_TB, target_TB = rand(4, 3), rand(4, 3)
    loss = losses.value_loss(value_TB, target_TB)
    loss.backward()
    torch.testing.assert_close(loss, ((value_TB - target_TB) ** 2).sum() / 24)
    torch.testing.assert_close(value_TB.grad, (value_TB - target_TB).detach() / 12)
    assert target_TB.grad is None


def test_gradients_agree_with_finite_differences() -> None:
    constant = rand(4, 3, grad=False)
    check = torch.autograd.gradcheck
    assert check(lambda x: losses.policy_gradient_loss(x, constant), rand(4, 3))
    assert check(lambda x: losses.value_loss(x, constant), rand(4, 3))
    assert check(lambda p: losses.entropy_cost(p, 10.0), rand())
    assert check(lambda cost: losses.entropy_cost_loss(cost, constant.mean(), 0.5), rand())


@pytest.mark.parametrize(("entropy", "sign"), [(0.2, 1.0), (0.8, -1.0)])
def test_the_entropy_cost_rises_when_entropy_is_too_low(entropy: float, sign: float) -> None:
    speed = 10.0
    parameter = torch.tensor(math.log(0.01) / speed, requires_grad=True)
    entropy_now = torch.tensor(entropy, requires_grad=True)
    cost = losses.entropy_cost(parameter, speed)
    torch.testing.assert_close(cost, torch.tensor(0.01))
    losses.entropy_cost_loss(cost, entropy_now, 0.5).backward()
    assert entropy_now.grad is None
    assert parameter.grad is not None
    torch.testing.assert_close(parameter.grad, torch.tensor(speed * 0.01 * (entropy - 0.5)))
    assert -parameter.grad.sign() == sign


def test_the_surrogate_is_a_slow_loop() -> None:
    log_ratio, advantage = rand(6, 5, grad=False), rand(6, 5, grad=False)
    expected = 0.0
    for x, a in zip(log_ratio.flatten().tolist(), advantage.flatten().tolist(), strict=True):
        ratio = math.exp(x)
        expected -= min(ratio * a, max(0.8, min(1.2, ratio)) * a) / 30
    loss = losses.clipped_surrogate_loss(log_ratio, advantage, 0.2)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [
        (1.1, 1.0, True),
        (1.3, 1.0, False),  # has gained enough
        (1.3, -1.0, True),  # went the wrong way: comes back
        (0.7, 1.0, True),
        (0.7, -1.0, False),
        (0.9, -1.0, True),
    ],
)
def test_the_surrogate_stops_only_what_would_gain(
    ratio: float, advantage: float, moves: bool
) -> None:
    log_ratio = torch.tensor(math.log(ratio), requires_grad=True)
    constant = torch.tensor(advantage, requires_grad=True)
    losses.clipped_surrogate_loss(log_ratio, constant, 0.2).backward()
    assert log_ratio.grad is not None
    assert log_ratio.grad.item() == pytest.approx(-ratio * advantage if moves else 0.0)
    assert constant.grad is None


@pytest.mark.parametrize(
    ("before", "value", "target", "moves"),
    [
        (0.0, 0.1, 1.0, True),
        (0.0, 0.5, 1.0, False),  # has moved far enough towards it
        (0.0, -0.5, 1.0, True),  # away from it: comes back
        (0.0, 1.5, 0.5, True),  # beyond it
    ],
)
def test_the_clipped_value_stops_where_it_has_moved_far(
    before: float, value: float, target: float, moves: bool
) -> None:
    estimate = torch.tensor(value, requires_grad=True)
    loss = losses.clipped_value_loss(estimate, torch.tensor(target), torch.tensor(before), 0.2)
    loss.backward()
    clipped = before + max(-0.2, min(0.2, value - before))
    expected = 0.5 * max((value - target) ** 2, (clipped - target) ** 2)
    assert loss.item() == pytest.approx(expected)
    assert estimate.grad is not None
    assert estimate.grad.item() == pytest.approx(value - target if moves else 0.0)
