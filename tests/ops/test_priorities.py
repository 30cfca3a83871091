"""Priorities and weights by hand."""

from __future__ import annotations

import pytest
import torch

from headrace.ops.priorities import importance_weights, sequence_priority


def test_a_priority_mixes_the_largest_error_and_the_mean() -> None:
    td_error_TB = torch.tensor([[1.0, 0.0], [-4.0, 2.0], [1.0, -2.0]])
    every_TB = torch.ones(3, 2, dtype=torch.bool)
    torch.testing.assert_close(
        sequence_priority(td_error_TB, every_TB),
        torch.tensor([0.9 * 4 + 0.1 * 2, 0.9 * 2 + 0.1 * 4 / 3]),
    )
    torch.testing.assert_close(
        sequence_priority(td_error_TB, every_TB, eta=0.25),
        torch.tensor([0.25 * 4 + 0.75 * 2, 0.25 * 2 + 0.75 * 4 / 3]),
    )


def test_masked_steps_count_in_neither() -> None:
    td_error_TB = torch.tensor([[-9.0, 1.0, torch.nan], [3.0, 9.0, 5.0], [1.0, 9.0, 5.0]])
    mask_TB = torch.tensor([[False, True, False], [True, False, False], [True, False, False]])
    priority_B = sequence_priority(td_error_TB, mask_TB, 0.5)
    torch.testing.assert_close(priority_B, torch.tensor([0.5 * 3 + 0.5 * 2, 1.0, 0.0]))


def test_a_priority_is_a_constant() -> None:
    td_error_TB = torch.ones(2, 1, requires_grad=True)
    assert not sequence_priority(td_error_TB, torch.ones(2, 1).bool()).requires_grad


@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.0])
def test_weights_undo_uneven_drawing(exponent: float) -> None:
    probability_B = torch.tensor([0.1, 0.4, 0.2])
    weight_B = importance_weights(probability_B, 1000, exponent)
    published_B = (1000 * probability_B) ** -exponent
    torch.testing.assert_close(weight_B, published_B / published_B.max())
    torch.testing.assert_close(weight_B, torch.tensor([1.0, 0.25, 0.5]) ** exponent)


def test_weights_of_a_large_replay_neither_vanish_nor_overflow() -> None:
    weight_B = importance_weights(torch.tensor([1e-12, 1e-7, 1e-6]), 10_000_000, 1.0)
    torch.testing.assert_close(weight_B, torch.tensor([1.0, 1e-5, 1e-6]))
