"""V-trace against equation 1 of the paper as written, and against returns known without it.

Shape suffixes: T = unroll steps, U = T + 1, B = unrolls.
"""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from headrace.ops.vtrace import vtrace_targets

T, B, GAMMA = 9, 5, 0.9


class Inputs(NamedTuple):
    log_ratio_TB: Tensor
    reward_TB: Tensor
    discount_TB: Tensor
    value_UB: Tensor


@pytest.fixture
def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(7)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, B, generator=generator, dtype=torch.float64)

    discount_TB = torch.full((T, B), GAMMA, dtype=torch.float64)
    discount_TB[4, 0] = discount_TB[0, 1] = discount_TB[-1, 2] = 0.0
    inputs = Inputs(normal(T), normal(T), discount_TB, normal(T + 1))
    for clip in (0.7, 1.0, 1.3, 2.0):
        assert 0 < (inputs.log_ratio_TB.exp() > clip).sum() < T * B
    return inputs


def explicit_sum(
    inputs: Inputs, rho_max: float, c_max: float, pg_rho_max: float, lambda_: float
) -> tuple[Tensor, Tensor]:
    """Equation 1 with the trace of Remark 2: a double sum, O(T^2)."""
    log_ratio_TB, reward_TB, discount_TB, value_UB = inputs
    ratio_TB = log_ratio_TB.exp()
    target_UB = value_UB.clone()
    for s in range(T):
        for t in range(s, T):
            trace_B = torch.ones(B, dtype=torch.float64)
            for i in range(s, t):
                c_B = lambda_ * torch.minimum(torch.tensor(c_max), ratio_TB[i])
                trace_B = trace_B * discount_TB[i] * c_B
            rho_B = torch.minimum(torch.tensor(rho_max), ratio_TB[t])
            td_B = reward_TB[t] + discount_TB[t] * value_UB[t + 1] - value_UB[t]
            target_UB[s] += trace_B * rho_B * td_B
    advantage_TB = torch.empty(T, B, dtype=torch.float64)
    for s in range(T):
        pg_rho_B = torch.minimum(torch.tensor(pg_rho_max), ratio_TB[s])
        td_target_B = reward_TB[s] + discount_TB[s] * target_UB[s + 1]
        advantage_TB[s] = pg_rho_B * (td_target_B - value_UB[s])
    return target_UB[:-1], advantage_TB


@pytest.mark.parametrize(
    ("rho_max", "c_max", "pg_rho_max", "lambda_"),
    [
        (1.0, 1.0, 1.0, 1.0),
        (2.0, 1.0, 1.3, 1.0),
        (1.3, 0.7, 2.0, 0.9),
        (0.7, 2.0, 1.0, 0.5),
        (1.0, 1.0, 1.0, 0.0),
    ],
)
def test_equals_the_double_sum_of_the_paper(
    inputs: Inputs, rho_max: float, c_max: float, pg_rho_max: float, lambda_: float
) -> None:
    targets = vtrace_targets(
        *inputs, rho_max=rho_max, c_max=c_max, pg_rho_max=pg_rho_max, lambda_=lambda_
    )
    value_TB, advantage_TB = explicit_sum(inputs, rho_max, c_max, pg_rho_max, lambda_)
    assert targets.value_TB.dtype == torch.float64
    torch.testing.assert_close(targets.value_TB, value_TB)
    torch.testing.assert_close(targets.advantage_TB, advantage_TB)


@pytest.mark.parametrize("lambda_", [1.0, 0.8])
def test_on_policy_is_the_lambda_return(inputs: Inputs, lambda_: float) -> None:
    on_policy = inputs._replace(log_ratio_TB=torch.zeros(T, B, dtype=torch.float64))
    _, reward_TB, discount_TB, value_UB = on_policy
    return_UB = value_UB.clone()
    for t in reversed(range(T)):
        mixed_B = (1 - lambda_) * value_UB[t + 1] + lambda_ * return_UB[t + 1]
        return_UB[t] = reward_TB[t] + discount_TB[t] * mixed_B
    targets = vtrace_targets(*on_policy, lambda_=lambda_)
    torch.testing.assert_close(targets.value_TB, return_UB[:-1])
    torch.testing.assert_close(
        targets.advantage_TB, reward_TB + discount_TB * return_UB[1:] - value_UB[:-1]
    )


@pytest.mark.parametrize("end", [0, 4, T - 1])
def test_nothing_after_an_end_reaches_what_came_before(inputs: Inputs, end: int) -> None:
    inputs.discount_TB[end] = 0.0
    before = vtrace_targets(*inputs)
    for x in (inputs.log_ratio_TB, inputs.reward_TB, inputs.value_UB):
        x[end + 1 :] += 100.0
    after = vtrace_targets(*inputs)
    assert torch.equal(before.value_TB[: end + 1], after.value_TB[: end + 1])
    assert torch.equal(before.advantage_TB[: end + 1], after.advantage_TB[: end + 1])
    torch.testing.assert_close(
        after.advantage_TB[end],
        inputs.log_ratio_TB[end].exp().clamp(max=1)
        * (inputs.reward_TB[end] - inputs.value_UB[end]),
    )


def test_truncation_with_the_true_value_has_nothing_to_learn() -> None:
    """Reward 1 for ever, cut every three steps: the value is 1 / (1 - gamma), the clock unseen."""
    true_value = 1.0 / (1.0 - GAMMA)
    truncated_TB = (torch.arange(T) % 3 == 2).unsqueeze(1).expand(T, B)
    reward_TB = 1.0 + GAMMA * truncated_TB * true_value
    targets = vtrace_targets(
        torch.randn(T, B), reward_TB, GAMMA * ~truncated_TB, torch.full((T + 1, B), true_value)
    )
    torch.testing.assert_close(targets.value_TB, torch.full((T, B), true_value))
    torch.testing.assert_close(targets.advantage_TB, torch.zeros(T, B), atol=1e-5, rtol=0)


def test_targets_are_constants_in_float32(inputs: Inputs) -> None:
    low = Inputs(*(x.bfloat16().requires_grad_() for x in inputs))
    targets = vtrace_targets(*low)
    exact = vtrace_targets(*(x.detach().double() for x in low))
    for target, expected in zip(targets, exact, strict=True):
        assert not target.requires_grad
        torch.testing.assert_close(target, expected.float(), atol=1e-5, rtol=1e-5)


def test_inputs_are_left_as_they_were(inputs: Inputs) -> None:
    copies = [x.clone() for x in inputs]
    vtrace_targets(*inputs)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 0.95])
def test_the_advantage_may_bootstrap_from_a_mixture(lambda_: float) -> None:
    """As rlax writes it: q = r + gamma (lambda v + (1 - lambda) V) at the next step."""
    generator = torch.Generator().manual_seed(5)
    log_ratio, reward = (torch.randn(6, 3, generator=generator).double() for _ in range(2))
    discount = 0.9 * (torch.rand(6, 3, generator=generator) > 0.2).double()
    value = torch.randn(7, 3, generator=generator).double()
    arguments = (log_ratio, reward, discount, value)
    traces = vtrace_targets(*arguments, lambda_=lambda_)
    mixed = vtrace_targets(*arguments, lambda_=lambda_, lambda_form="advantage")
    assert torch.equal(mixed.value_TB, traces.value_TB)
    for step in range(6):
        for column in range(3):
            following = value[step + 1, column]
            if step < 5:
                target = traces.value_TB[step + 1, column]
                following = lambda_ * target + (1 - lambda_) * following
            q = reward[step, column] + discount[step, column] * following
            weight = min(1.0, math.exp(log_ratio[step, column]))
            wanted = weight * (q - value[step, column])
            assert float(mixed.advantage_TB[step, column]) == pytest.approx(float(wanted))
    assert not torch.allclose(mixed.advantage_TB, traces.advantage_TB)
