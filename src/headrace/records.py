"""What crosses a boundary: one NamedTuple per boundary, a shape and a meaning per field.

Shape suffixes, here and in `ops`, `networks` and `algorithms`: T = steps of an unroll, by action;
U = T + 1 rows, by arrival (the last row only bootstraps); B = unrolls; N = environments in one
batch; K = stacked frames; A = actions. Systems code names arrays without suffixes.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PolicyState(NamedTuple):
    """What the policy keeps for an environment between two steps; rows are environments."""

    stack: Tensor  # [N, K, ...] newest K observations, newest last, zeros before the episode began
    recurrent: tuple[Tensor, ...]  # each [N, ...]; empty for a feed-forward network
    previous_action: Tensor  # [N, ...] int64, -1 at the start of an episode; or float32, 0 there


class PolicyInput(NamedTuple):
    """What a network sees. Leading dimensions are [U, B]; one step is [1, N]."""

    observation: Tensor  # [U, B, K, ...] stacked, in the dtype of the environment
    reward: Tensor  # [U, B] float32 raw reward of the step that led here, 0 where reset
    previous_action: Tensor  # [U, B, ...] int64, -1 where reset; or float32, 0 where reset
    reset: Tensor  # [U, B] bool: recurrent state is cleared before this row
    action_mask: Tensor | None = None  # [U, B, A] bool: actions that are allowed


class PolicyStep(NamedTuple):
    """SERVER: what was done at one row."""

    action: Tensor  # [N] int64, [N, D] int64, or [N, D] float32: what the learner learns from
    log_prob: Tensor  # [N] float32 log-probability of the action under the behaviour policy
    value: Tensor  # [N] float32 value estimate, unnormalised
    env_action: Tensor | None = None  # [N, D] what the environment is told, if not `action` itself
    action_value: Tensor | None = (
        None  # [N] float32 Q of `action`, unnormalised, where a rule has it
    )


class Finals(NamedTuple):
    """Last observations of episodes that met the clock: no row has them, since those begin anew.

    F is padded to few different sizes; padding has `valid` unset and points at step 0, column 0.
    """

    observation: Tensor  # [F, K, ...] stacked upon the frames of the old episode
    step: Tensor  # [F] int64 index by action, as in Batch: where `truncated` is set
    column: Tensor  # [F] int64 which unroll or sequence
    valid: Tensor  # [F] bool
    action_mask: Tensor | None = None  # [F, A] bool: actions that are allowed there


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
    previous_action: Tensor  # [U, B, ...] as in PolicyInput
    action: Tensor  # [U, B, ...] as in PolicyStep
    log_prob: Tensor  # [U, B] float32, behaviour policy
    version: Tensor  # [U, B] int64 update that made the weights that acted
    recurrent: tuple[Tensor, ...]  # each [B, ...] state fed to row 0
    action_mask: Tensor | None = None  # [U, B, A] bool
    value: Tensor | None = None  # [U, B] float32 as in PolicyStep, where a replay keeps it
    action_value: Tensor | None = None  # [U, B] float32 as in PolicyStep, where a replay keeps it
    weight: Tensor | None = None  # [B] float32 importance of a sampled sequence, in (0, 1]
    finals: Finals | None = None  # None where nothing was truncated, or `bootstrap` says it all


class Batch(NamedTuple):
    """LEARNER: unrolls by action. Index t of a [T, B] field belongs to the action at row t."""

    inputs: PolicyInput  # [U, B, ...] by arrival: what the network sees
    recurrent: tuple[Tensor, ...]  # each [B, ...] state fed to row 0
    action: Tensor  # [T, B, ...] as in PolicyStep
    log_prob: Tensor  # [T, B] float32, behaviour policy
    reward: Tensor  # [T, B] float32 raw reward that the action earned
    terminated: Tensor  # [T, B] bool: the action ended the MDP (or a life)
    truncated: Tensor  # [T, B] bool: the action met the clock
    bootstrap: Tensor  # [T, B] float32 value of the final observation where truncated, else 0
    version: Tensor  # [T, B] int64
    value: Tensor | None = None  # [U, B] float32 as in PolicyStep: of the policy that acted
    action_value: Tensor | None = None  # [T, B] float32 as in PolicyStep
    weight: Tensor | None = None  # [B] float32 importance of a sampled sequence, in (0, 1]
    finals: Finals | None = None  # final observations of truncated steps, from a replay


class Update(NamedTuple):
    """What one update reports. Tensors stay on the device; whoever writes them copies."""

    metrics: dict[str, Tensor]  # scalars by name, such as loss/policy
    finite: Tensor  # bool scalar: loss and gradient norm were finite
    priority: Tensor | None = None  # [B] float32 > 0: how often each sampled sequence should return
    passes: int | None = None  # over the batch; None for as many as the rule's `experience` says
