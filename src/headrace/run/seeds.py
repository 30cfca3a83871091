"""Where all random numbers of a run begin: at one seed, in a stream of its own for each use."""

from __future__ import annotations

from enum import IntEnum, unique

import numpy as np


@unique
class Use(IntEnum):
    """What is drawn, no two under one name. A number here that changes changes what runs learn."""

    NETWORK = 0
    """Weights at the start."""
    SERVER_ACTIONS = 1
    TRAINING_ENVIRONMENTS = 2
    EVALUATION_ENVIRONMENTS = 3
    """Beside training."""
    POLICY_ACTIONS = 4
    """Of a policy that was loaded."""
    POLICY_ENVIRONMENTS = 5
    REPLAY = 6
    """What a batch is sampled from."""
    EVALUATION_ACTIONS = 7
    EVALUATOR = 8
    """Its environments, by version of the weights."""
    VIEWER = 9
    FILM = 10
    EPISODE = 11
    """Those after the first that a player shows."""
    ACTING_WORKER = 12
    """Actions of a worker that acts, here or on another machine."""
    SESSION_UPDATES = 14
    """What several learners draw in updates."""
    RANK_UPDATES = 15
    """And each of them."""
    RESTART = 16
    """Environments of a worker that was started again."""
    GLOBAL = 17
    """torch, numpy and Python, for what a user brings (`run.draws`)."""
    UPDATES = 18
    """What an algorithm draws in updates: shuffles, noise."""
    POLICY_RESET = 19
    """Environments of a loaded policy that a reset makes anew."""
    ENVIRONMENT_DRAWS = 20
    """Global random states of environments, in lockstep; by the seed of their pool."""


def derived_seed(seed: int, use: Use, *parts: int) -> int:
    """Returns a 31-bit seed for one use; other numbers, or more of them, give another one.

    Args:
        seed: Of the run; like all of them from 0 to 2**64 - 1.
        use: What for.
        parts: Which of several: the session, the worker and the like.
    """
    words = [word for part in (seed, use, *parts) for word in divmod(part, 1 << 32)]
    # Their count, since what is short is filled up with zeros.
    return int(np.random.SeedSequence((len(words), *words)).generate_state(1)[0] >> 1)
