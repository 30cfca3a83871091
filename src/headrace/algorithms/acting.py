"""How an actor-critic acts: the same for every learning rule of that kind.

Shape suffixes: N = environments, P = parameters of the policy, A = choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.algorithms.base import ActionMode, Model
from headrace.ops.distributions import Distribution
from headrace.records import PolicyInput, PolicyStep


def act_by_policy(
    distribution: Distribution,
    model: Model,
    inputs: PolicyInput,
    recurrent: tuple[Tensor, ...],
    *,
    mode: ActionMode,
    generator: torch.Generator | None = None,
    epsilon: float | Tensor = 0.0,
) -> tuple[PolicyStep, tuple[Tensor, ...]]:
    """Samples, or takes the likeliest action ("epsilon": but for a share of random ones).

    Actions that the mask forbids are never taken, in no mode.
    """
    output, recurrent = model(inputs, recurrent)
    parameters_NP: Tensor = output.parameters[0]
    mask_NA = None if inputs.action_mask is None else inputs.action_mask[0]
    masked_NP = distribution.masked(parameters_NP, mask_NA)
    if mode == "sample":
        action = distribution.sample(masked_NP, generator)
    else:
        action = distribution.greedy(masked_NP)
    if mode == "epsilon":
        uniform = distribution.uniform(parameters_NP, mask=mask_NA, generator=generator)
        draw_N = torch.rand(len(action), device=action.device, generator=generator)
        is_random = (draw_N < epsilon).view(-1, *[1] * (action.dim() - 1))
        action = torch.where(is_random, uniform, action)
    log_prob_N = distribution.log_prob(masked_NP, action)
    step = PolicyStep(action, log_prob_N, output.value[0], distribution.to_env(action))
    return step, recurrent
