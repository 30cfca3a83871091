"""What environments hand over. Here and not in `records`, since workers must not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

INFO_NBYTES = 1024
"""Room for the numeric scalars of one final info."""
RUN_IDS = 1 << 32
"""Run ids of one life of a worker, or of one grant to a worker host; an environment may use them up
by itself, and who starts the next life adds that many."""

EpisodeInfo = Mapping[int, Mapping[str, float]]
"""Numeric scalars of the final `info`, by row of the step."""


class EnvStep(NamedTuple):
    """WORKERS -> SERVER. Row i is what environment `env_id[i]` showed on arrival."""

    env_id: NDArray[np.int32]  # [N] global slot, stable for the life of the run
    run_id: NDArray[np.int64]  # [N] changes when the environment was started anew (a worker died)
    observation: NDArray[
        np.generic
    ]  # [N, ...] a single frame; after an end, the first of the next episode
    reward: NDArray[np.float32]  # [N] reward of the step just made, raw
    reset: NDArray[np.bool_]  # [N] this observation is the first of an episode
    terminated: NDArray[
        np.bool_
    ]  # [N] the step before ended the MDP (or a life): bootstrap from zero
    truncated: NDArray[
        np.bool_
    ]  # [N] the step before met the clock: bootstrap from the final observation
    final_observation: (
        NDArray[np.generic] | None
    )  # [N, ...] valid where terminated or truncated with reset
    action_mask: NDArray[np.bool_] | None = None  # [N, A] which actions are allowed here
    final_action_mask: NDArray[np.bool_] | None = (
        None  # [N, A] the same at the final observation; valid where truncated
    )
    episode_info: EpisodeInfo | None = None  # of the episodes that ended with this step

    @property
    def absent(self) -> NDArray[np.bool_]:
        """[N] rows that a vector of a user's holds back, which no pool hands out.

        They say terminated and truncated at once. Their episode has ended, and with the next step
        of their vector, which ignores their action, they come with that end and the next episode.
        """
        return self.terminated & self.truncated
