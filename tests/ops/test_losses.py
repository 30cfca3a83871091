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
