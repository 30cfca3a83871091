"""Sequences from a replay: without their burn-in, and as returns that honour every end.

A clock that cuts an episode is not its end: what the final observation is worth goes into the
return. Where no final observation is at hand, the returns that would need it are marked.

Shape suffixes: R = steps after the burn-in, U = R + 1 rows, B = sequences, F = final observations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.ops.n_step import n_step_targets
from headrace.records import Batch, Finals, PolicyInput


def chosen(value: Tensor, action: Tensor) -> Tensor:
    """Picks `action` [...] from `value` [..., A]."""
    return value.gather(-1, action.unsqueeze(-1)).squeeze(-1)


def rows_of(inputs: PolicyInput, rows: slice) -> PolicyInput:
    """Takes a range of rows."""
    mask = inputs.action_mask
    return PolicyInput(
        observation=inputs.observation[rows],
        reward=inputs.reward[rows],
        previous_action=inputs.previous_action[rows],
        reset=inputs.reset[rows],
        action_mask=None if mask is None else mask[rows],
    )


def without_burn_in(batch: Batch, burn_in_steps: int) -> Batch:
    """Returns what lies behind the burn-in; `recurrent` remains the state before it.

    Final observations within the burn-in become padding.
    """
    rows, finals = slice(burn_in_steps, None), batch.finals
    if finals is not None:
        step_F = finals.step - burn_in_steps
        finals = finals._replace(step=step_F.clamp(min=0), valid=finals.valid & (step_F >= 0))
    return batch._replace(
        inputs=rows_of(batch.inputs, rows),
        action=batch.action[rows],
        log_prob=batch.log_prob[rows],
        reward=batch.reward[rows],
        terminated=batch.terminated[rows],
        truncated=batch.truncated[rows],
        bootstrap=batch.bootstrap[rows],
        version=batch.version[rows],
        value=None if batch.value is None else batch.value[rows],
        action_value=None if batch.action_value is None else batch.action_value[rows],
        finals=finals,
    )


def final_inputs(batch: Batch, finals: Finals) -> PolicyInput:
    """What a network sees [1, F, ...] one step on from the rows that the clock ended."""
    at = finals.step, finals.column
    return PolicyInput(
        observation=finals.observation.unsqueeze(0),
        reward=batch.reward[at].unsqueeze(0),
        previous_action=batch.action[at].unsqueeze(0),
        reset=torch.zeros_like(finals.valid).unsqueeze(0),
        action_mask=None if finals.action_mask is None else finals.action_mask.unsqueeze(0),
    )


def in_place(value_F: Tensor, finals: Finals, *, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Puts values of final observations where the clock ended a step.

    Returns:
        The values, 0 where there is none, and where there is one; both of `shape`, [R, B].
    """
    at_F = finals.step * shape[1] + finals.column
    # Added, not set: padding shares its place with step 0 of column 0.
    value_RB = value_F.new_zeros(shape)
    value_RB.view(-1).scatter_add_(0, at_F, torch.where(finals.valid, value_F, 0.0))
    count_RB = value_F.new_zeros(shape)
    count_RB.view(-1).scatter_add_(0, at_F, finals.valid.to(value_F.dtype))
    return value_RB, count_RB > 0


def n_step_returns(
    batch: Batch,
    reward_RB: Tensor,
    final_value_RB: Tensor,
    value_UB: Tensor,
    *,
    discount: float,
    steps: int,
) -> Tensor:
    """Returns [R, B] over `steps` steps; the last ones shrink.

    Args:
        batch: Says where episodes end.
        reward_RB: transformed rewards.
        final_value_RB: of final observations, looked at where the clock alone ended a step.
        value_UB: of all rows, in the unit of the rewards.
        discount: gamma.
        steps: n.
    """
    ended_RB = batch.terminated | batch.truncated
    past_clock_RB = torch.where(_met_clock(batch), final_value_RB, 0.0)
    return n_step_targets(
        reward_RB + discount * past_clock_RB,
        discount * (~ended_RB).to(value_UB.dtype),
        value_UB,
        steps=steps,
    )


def lacks_final(batch: Batch, has_final_RB: Tensor, *, steps: int) -> Tensor:
    """Where [R, B] a return over `steps` steps meets the clock, and what lies behind is unknown."""
    goes_on_RB = ~(batch.terminated | batch.truncated)
    lack_RB = _met_clock(batch) & ~has_final_RB
    # A return of what is lacking: it passes steps, and stops at ends, as rewards do.
    nothing_UB = torch.zeros_like(batch.inputs.reset, dtype=torch.float32)
    return n_step_targets(lack_RB.float(), goes_on_RB.float(), nothing_UB, steps=steps) > 0


def _met_clock(batch: Batch) -> Tensor:
    return batch.truncated & ~batch.terminated
