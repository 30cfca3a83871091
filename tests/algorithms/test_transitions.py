"""Transitions of n steps beside a walk along each sequence, with every kind of end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from headrace.algorithms.transitions import transitions
from headrace.records import Batch, Finals
from headrace.specs import EnvSpec

MakeSpec = Callable[..., EnvSpec]
MakeBatch = Callable[..., Batch]
GAMMA, B = 0.9, 64


def with_finals(batch: Batch, *, lacking: tuple[int, ...] = ()) -> tuple[Batch, torch.Tensor]:
    """Adds final observations, in no order and padded; returns them as a table [T, B, ...].

    Steps that terminated too have none: nothing is worth anything behind them.
    """
    step, column = (batch.truncated & ~batch.terminated).nonzero().unbind(1)
    order = torch.randperm(len(step), generator=torch.Generator().manual_seed(0))
    table = 100 + torch.randn(*batch.truncated.shape, *batch.inputs.observation.shape[2:])
    valid = torch.ones(len(step), dtype=torch.bool)
    for b in lacking:
        valid &= column != b
    padding = torch.zeros(7, dtype=torch.int64)
    finals = Finals(
        observation=torch.cat((table[step, column][order], torch.full_like(table[0, :7], 777.0))),
        step=torch.cat((step[order], padding)),
        column=torch.cat((column[order], padding)),
        valid=torch.cat((valid[order], torch.zeros(7, dtype=torch.bool))),
    )
    return batch._replace(finals=finals), table


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_transitions_are_walks(spec_of: MakeSpec, random_batch: MakeBatch, steps: int) -> None:
    batch = random_batch(spec_of("continuous"), (), T=steps, B=B)
    both = torch.rand(steps, B, generator=torch.Generator().manual_seed(1)) < 0.3
    batch = batch._replace(terminated=batch.terminated | (batch.truncated & both))
    assert (batch.terminated & batch.truncated).any()
    cut = (batch.truncated & ~batch.terminated).any(dim=0)
    lacking = (int(cut.nonzero()[0, 0]),)
    batch, table = with_finals(batch, lacking=lacking)
    made = transitions(batch, 2.0 * batch.reward, discount=GAMMA)
    assert torch.equal(made.observation, batch.inputs.observation[0])
    assert torch.equal(made.action, batch.action[0])
    kinds = set()
    for b in range(B):
        reward = surprise = 0.0
        led_to, discount, known, kind = batch.inputs.observation[-1, b], GAMMA**steps, True, "goes"
        for t in range(steps):
            reward += GAMMA**t * 2.0 * batch.reward[t, b].item()
            surprise -= GAMMA**t * batch.log_prob[t, b].item() if t else 0.0
            if batch.terminated[t, b]:
                discount, kind = 0.0, "terminated"
                break
            if batch.truncated[t, b]:
                led_to, discount, kind = table[t, b], GAMMA ** (t + 1), "truncated"
                known = b not in lacking
                break
        kinds.add(kind)
        assert made.reward[b].item() == pytest.approx(reward, abs=1e-5)
        assert made.surprise[b].item() == pytest.approx(surprise, abs=1e-5)
        assert made.discount[b].item() == pytest.approx(discount, abs=1e-6)
        assert made.known[b] == known
        if known and discount:
            assert torch.equal(made.next_observation[b], led_to), f"column {b}: {kind}"
    assert kinds == {"goes", "terminated", "truncated"}


def test_without_any_final_observation_ends_by_the_clock_are_unknown(
    spec_of: MakeSpec, random_batch: MakeBatch
) -> None:
    batch = random_batch(spec_of("continuous"), (), T=1, B=B)
    made = transitions(batch, batch.reward, discount=GAMMA)
    assert batch.truncated.any()
    assert torch.equal(made.known, ~batch.truncated[0])
    assert torch.equal(made.next_observation, batch.inputs.observation[1])
    assert made.surprise.tolist() == [0.0] * B
