"""The ladder of Ape-X, and epsilon-greedy choices counted."""

from __future__ import annotations

import pytest
import torch

from headrace.ops.exploration import epsilon_greedy, epsilon_ladder

N = 20_000


def test_the_ladder_is_the_published_one() -> None:
    ladder = epsilon_ladder(8)
    assert ladder.dtype == torch.float32
    expected = torch.tensor([0.4 ** (1 + 7 * i / 7) for i in range(8)])
    torch.testing.assert_close(ladder, expected)
    torch.testing.assert_close(epsilon_ladder(256)[[0, -1]], torch.tensor([0.4, 0.4**8]))
    torch.testing.assert_close(
        epsilon_ladder(3, base=0.5, power=2.0), torch.tensor([0.5, 0.25, 0.125])
    )


def test_one_environment_has_the_first_rung() -> None:
    torch.testing.assert_close(epsilon_ladder(1), torch.tensor([0.4]))
    torch.testing.assert_close(epsilon_ladder(1, base=0.1, power=0.0), torch.tensor([0.1]))


def test_no_environments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        epsilon_ladder(0)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_shares_and_log_probabilities_agree(epsilon: float) -> None:
    value_NA = torch.tensor([1.0, -2.0, 5.0, 4.0]).expand(N, 4)
    choice = epsilon_greedy(value_NA, epsilon, generator=torch.Generator().manual_seed(1))
    assert (choice.best_N == 2).all()
    wanted = torch.full((4,), epsilon / 4)
    wanted[2] += 1 - epsilon
    share_A = torch.bincount(choice.action_N, minlength=4) / N
    torch.testing.assert_close(share_A, wanted, atol=0.015, rtol=0.0)
    torch.testing.assert_close(choice.log_prob_N.exp(), wanted[choice.action_N])


def test_each_environment_has_its_own_share() -> None:
    epsilon_N = torch.tensor([0.0, 0.2, 1.0]).repeat_interleave(N)
    value_NA = torch.tensor([0.0, 1.0]).expand(3 * N, 2)
    choice = epsilon_greedy(value_NA, epsilon_N)
    differs = (choice.action_N == 0).view(3, N).float().mean(dim=1)
    torch.testing.assert_close(differs, torch.tensor([0.0, 0.1, 0.5]), atol=0.015, rtol=0.0)
    prob_N = torch.where(choice.action_N == 1, 1 - epsilon_N / 2, epsilon_N / 2)
    torch.testing.assert_close(choice.log_prob_N.exp(), prob_N)


@pytest.mark.parametrize("epsilon", [None, 0.0, 0.5, 1.0])
def test_what_the_mask_forbids_is_not_done(epsilon: float | None) -> None:
    value_NA = torch.tensor([9.0, 1.0, 2.0, 8.0]).expand(N, 4)
    mask_NA = torch.tensor([False, True, True, False]).expand(N, 4)
    choice = epsilon_greedy(value_NA, epsilon, mask_NA=mask_NA)
    assert (choice.best_N == 2).all()
    shares = (torch.bincount(choice.action_N, minlength=4) / N).tolist()
    half = (epsilon or 0.0) / 2
    assert shares == pytest.approx([0.0, half, 1 - half, 0.0], abs=0.015)
    prob_N = torch.where(choice.action_N == 2, 1 - half, half)
    torch.testing.assert_close(choice.log_prob_N.exp(), prob_N)


def test_a_mask_that_forbids_all_forbids_nothing() -> None:
    choice = epsilon_greedy(
        torch.tensor([[1.0, 3.0, 2.0]]), None, mask_NA=torch.zeros(1, 3, dtype=torch.bool)
    )
    assert choice.best_N.item() == 1


def test_the_best_alone_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    choice = epsilon_greedy(torch.randn(5, 4), None, generator=generator)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(choice.action_N, choice.best_N)
    assert (choice.log_prob_N == 0).all()


def test_values_that_are_not_numbers_still_give_an_action() -> None:
    action_N = epsilon_greedy(torch.full((8, 3), torch.nan), 0.5).action_N
    assert ((action_N >= 0) & (action_N < 3)).all()
