"""n-step targets against a loop that walks every trajectory.

Shape suffixes: T = steps, U = T + 1, B = sequences.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headrace.ops.n_step import n_step_targets

T, B, GAMMA = 11, 6, 0.9


def walk(
    reward_TB: Tensor,
    terminated_TB: Tensor,
    truncated_TB: Tensor,
    bootstrap_TB: Tensor,
    value_UB: Tensor,
    steps: int,
) -> Tensor:
    """Earns rewards step by step until n were earned, the episode or the sequence is over."""
    target_TB = torch.empty_like(reward_TB)
    for b in range(reward_TB.shape[1]):
        for start in range(len(reward_TB)):
            total, weight, t, ended = 0.0, 1.0, start, False
            while t < min(start + steps, len(reward_TB)) and not ended:
                total += weight * reward_TB[t, b].item()
                weight *= GAMMA
                ended = bool(terminated_TB[t, b] | truncated_TB[t, b])
                if truncated_TB[t, b]:
                    total += weight * bootstrap_TB[t, b].item()
                t += 1
            target_TB[start, b] = total if ended else total + weight * value_UB[t, b].item()
    return target_TB


@pytest.mark.parametrize("steps", range(1, T + 4))
def test_equals_a_walk_along_every_trajectory(steps: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    reward_TB, bootstrap_TB, value_UB = (
        torch.randn(rows, B, dtype=torch.float64, generator=generator) for rows in (T, T, T + 1)
    )
    kind_TB = torch.randint(8, (T, B), generator=generator)
    terminated_TB, truncated_TB = kind_TB == 0, kind_TB == 1
    assert terminated_TB.any()
    assert truncated_TB.any()
    target_TB = n_step_targets(
        reward_TB + GAMMA * torch.where(truncated_TB, bootstrap_TB, 0.0),
        GAMMA * (~(terminated_TB | truncated_TB)).double(),
        value_UB,
        steps=steps,
    )
    expected_TB = walk(reward_TB, terminated_TB, truncated_TB, bootstrap_TB, value_UB, steps)
    assert target_TB.dtype == torch.float64
    torch.testing.assert_close(target_TB, expected_TB)


def test_the_last_targets_shrink_to_the_last_value() -> None:
    value_UB = torch.tensor([[7.0], [7.0], [7.0], [100.0]])
    target_TB = n_step_targets(torch.ones(3, 1), torch.full((3, 1), 0.5), value_UB, steps=2)
    torch.testing.assert_close(
        target_TB, torch.tensor([[1 + 0.5 + 0.25 * 7], [1 + 0.5 + 25], [1 + 50.0]])
    )


def test_targets_are_constants_in_float32_and_inputs_are_left() -> None:
    inputs = [torch.randn(rows, B).bfloat16().requires_grad_() for rows in (T, T, T + 1)]
    copies = [x.detach().clone() for x in inputs]
    target_TB = n_step_targets(inputs[0], inputs[1], inputs[2], steps=3)
    assert target_TB.dtype == torch.float32
    assert not target_TB.requires_grad
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        n_step_targets(torch.ones(3, 1), torch.ones(3, 1), torch.ones(4, 1), steps=0)
