"""The global random states, as code of the user's draws from them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from headrace.learner.flattening import flatten, unflatten
from headrace.run.draws import global_states, own_draws, set_global_states


def drawn() -> list[float]:
    """An odd number of each, so that those who draw in pairs have one left over."""
    normal = np.random.standard_normal()  # noqa: NPY002 - the global state is meant
    return [random.random(), random.gauss(0, 1), float(normal), float(torch.randn(1))]


def test_states_go_on_from_what_a_checkpoint_has_kept() -> None:
    with own_draws(3):
        drawn()
        kept = unflatten(*flatten(global_states()))
        after = drawn()
        assert drawn() != after
        set_global_states(kept)
        assert drawn() == after


@pytest.mark.parametrize("is_first", [True, False])
def test_gpus_that_a_block_is_the_first_to_use_are_seeded_at_random(
    is_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = [not is_first]
    seeded: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used[-1])
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [torch.zeros(16)])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    monkeypatch.setattr(torch.cuda, "seed_all", lambda: seeded.append(True))
    with own_draws(3):
        used.append(True)
    assert seeded == [True] * is_first
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with own_draws(3):
        pass
    assert seeded == [True] * is_first


def test_a_block_with_a_seed_begins_there_and_leaves_nothing() -> None:
    with own_draws(1):
        first = drawn()
        with own_draws(2):
            assert drawn() != first
        later = drawn()
    with own_draws(1):
        assert drawn() == first
        assert drawn() == later
