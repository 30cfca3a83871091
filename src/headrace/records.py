"""What crosses a boundary: one NamedTuple per boundary, a shape and a meaning per field.

Shape suffixes, here and in `ops`, `networks` and `algorithms`: T = steps of an unroll, by action;
U = T + 1 rows, by arrival (the last row only bootstraps); B = unrolls; N = environments in one
batch; K = stacked frames; A = actions. Systems code names arrays without suffixes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


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


class PolicyState(NamedTuple):
    """What the policy keeps for an environment between two steps; rows are environments."""

    stack: Tensor  # [N, K, ...] newest K observations, newest last, zeros before the episode began
    recurrent: tuple[Tensor, ...]  # each [N, ...]; empty for a feed-forward network
    previous_action: Tensor  # [N] int64; -1 at the start of an episode


class PolicyInput(NamedTuple):
    """What a network sees. Leading dimensions are [U, B]; one step is [1, N]."""

    observation: Tensor  # [U, B, K, ...] stacked, in the dtype of the environment
    reward: Tensor  # [U, B] float32 raw reward of the step that led here, 0 where reset
    previous_action: Tensor  # [U, B] int64, -1 where reset
    reset: Tensor  # [U, B] bool: recurrent state is cleared before this row


class PolicyStep(NamedTuple):
    """SERVER: what was done at one row."""

    action: Tensor  # [N] int64
    log_prob: Tensor  # [N] float32 log-probability of the action under the behaviour policy
    value: Tensor  # [N] float32 value estimate, unnormalised


class Unrolls(NamedTuple):
    """SERVER -> LEARNER: unrolls as they were stored, by arrival, time first.

    Row t holds what was known on arrival at t and what was done there. Row T is the first row of
    the next unroll of the same environment.
    """

    observation: Tensor  # [U, B, K, ...] stacked
    reward: Tensor  # [U, B] float32 raw reward of the step that led here
    reset: Tensor  # [U, B] bool
    terminated: Tensor  # [U, B] bool
    truncated: Tensor  # [U, B] bool
    bootstrap: Tensor  # [U, B] float32 value of the final observation; valid where truncated
    previous_action: Tensor  # [U, B] int64, -1 where reset
    action: Tensor  # [U, B] int64
    log_prob: Tensor  # [U, B] float32, behaviour policy
    version: Tensor  # [U, B] int64 update that made the weights that acted
    recurrent: tuple[Tensor, ...]  # each [B, ...] state fed to row 0


class Batch(NamedTuple):
    """LEARNER: unrolls by action. Index t of a [T, B] field belongs to the action at row t."""

    inputs: PolicyInput  # [U, B, ...] by arrival: what the network sees
    recurrent: tuple[Tensor, ...]  # each [B, ...] state fed to row 0
    action: Tensor  # [T, B] int64
    log_prob: Tensor  # [T, B] float32, behaviour policy
    reward: Tensor  # [T, B] float32 raw reward that the action earned
    terminated: Tensor  # [T, B] bool: the action ended the MDP (or a life)
    truncated: Tensor  # [T, B] bool: the action met the clock
    bootstrap: Tensor  # [T, B] float32 value of the final observation where truncated, else 0
    version: Tensor  # [T, B] int64


class Update(NamedTuple):
    """What one update reports. Tensors stay on the device; whoever writes them copies."""

    metrics: dict[str, Tensor]  # scalars by name, such as loss/policy
    finite: Tensor  # bool scalar: loss and gradient norm were finite
