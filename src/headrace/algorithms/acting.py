"""How an actor-critic acts, and what has values of actions: the same for every such rule.

Shape suffixes: N = environments, P = parameters of the policy, A = choices.
"""

from __future__ import annotations

from collections.abc import Callable

import gymnasium as gym
import torch
from torch import Tensor

from headrace.algorithms.base import ActionMode, Model
from headrace.algorithms.sequences import chosen
from headrace.errors import ConfigError
from headrace.ops.distributions import Categorical, Distribution
from headrace.ops.exploration import epsilon_greedy
from headrace.records import PolicyInput, PolicyStep
from headrace.specs import EnvSpec


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
        action = some_of(uniform, action, share=epsilon, generator=generator)
    log_prob_N = distribution.log_prob(masked_NP, action)
    step = PolicyStep(action, log_prob_N, output.value[0], distribution.to_env(action))
    return step, recurrent


def some_of(
    other: Tensor, action: Tensor, *, share: float | Tensor, generator: torch.Generator | None
) -> Tensor:
    """Returns actions [N, ...], a random `share` of them, one or [N], replaced by `other` ones."""
    draw_N = torch.rand(len(action), device=action.device, generator=generator)
    is_other = (draw_N < share).view(-1, *[1] * (action.dim() - 1))
    return torch.where(is_other, other, action)


def one_choice(rule: str, spec: EnvSpec) -> Categorical:
    """Returns the kind of actions that values can be said of.

    Raises:
        ConfigError: they are of another kind.
    """
    space = spec.action_space
    if not isinstance(space, gym.spaces.Discrete):
        raise ConfigError(
            f"{spec.name}: {rule} needs one discrete choice of action, not {space}: use "
            "--algorithm impala or ppo"
        )
    return Categorical(int(space.n))


def act_by_values(
    model: Model,
    inputs: PolicyInput,
    recurrent: tuple[Tensor, ...],
    *,
    mode: ActionMode,
    generator: torch.Generator | None = None,
    epsilon: float | Tensor = 0.0,
    in_reward_unit: Callable[[Tensor], Tensor] = lambda value: value,
) -> tuple[PolicyStep, tuple[Tensor, ...]]:
    """Takes the best action that is allowed, but for a share `epsilon` of random ones.

    Modes "sample" and "epsilon" are the same; "greedy" is without the share. `in_reward_unit` makes
    what the network says a value in the unit of transformed rewards.
    """
    output, recurrent = model(inputs, recurrent)
    value_NA: Tensor = output.value[0]
    choice = epsilon_greedy(
        value_NA,
        None if mode == "greedy" else epsilon,
        mask_NA=None if inputs.action_mask is None else inputs.action_mask[0],
        generator=generator,
    )
    step = PolicyStep(
        action=choice.action_N,
        log_prob=choice.log_prob_N,
        value=in_reward_unit(chosen(value_NA, choice.best_N)),
        action_value=in_reward_unit(chosen(value_NA, choice.action_N)),
    )
    return step, recurrent
