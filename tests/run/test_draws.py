"""The global random states, as code of the user's draws from them."""

from __future__ import annotations

import random

import numpy as np
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


def test_a_block_with_a_seed_begins_there_and_leaves_nothing() -> None:
    with own_draws(1):
        first = drawn()
        with own_draws(2):
            assert drawn() != first
        later = drawn()
    with own_draws(1):
        assert drawn() == first
        assert drawn() == later
