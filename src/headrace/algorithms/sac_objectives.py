"""What SAC's critics and actor minimise, as functions of networks and tensors.

They keep nothing and draw nothing: what chance has in them comes in as `Draws`. Networks are
callables, so that over `torch.func.functional_call` these are functions of weights, which
`torch.func.grad` differentiates and a compiler takes as one graph.

Shape suffixes: B = transitions, N = critics, P = parameters of the policy, D = components of an
action, H = width of a hidden layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from headrace.algorithms.transitions import Transition
from headrace.ops.soft_values import critics_loss, soft_policy_loss, soft_targets
from headrace.ops.squashed_normal import SquashedNormal

ActorFn = Callable[[Tensor], Tensor]
"""Rows to parameters [B, P]."""
CriticsFn = Callable[[Tensor, Tensor, tuple[Tensor, ...]], Tensor]
"""Rows, actions [B, D] and dropout masks to Q [N, B]."""


class Draws(NamedTuple):
    """What chance has in one update. Masks are each [N, B, H]; () where nothing is dropped."""

    next_noise: Tensor  # [B, D] standard normal, of the actions behind
    noise: Tensor  # [B, D] standard normal, of the actions that the actor learns from
    target_masks: tuple[Tensor, ...]  # of the target critics
    masks: tuple[Tensor, ...]  # of the critics that learn
    actor_masks: tuple[Tensor, ...]  # of the critics that the actor learns from


class Drawn(NamedTuple):
    """Actions of the policy as it is."""

    action: Tensor  # [B, D] before the squash
    log_prob: Tensor  # [B]


def draw_actions(actor: ActorFn, rows: Tensor, noise_BD: Tensor, policy: SquashedNormal) -> Drawn:
    """Makes actions of noise; they have a gradient."""
    parameters_BP = actor(rows)
    action_BD = policy.placed(parameters_BP, noise_BD)
    return Drawn(action_BD, policy.log_prob(parameters_BP, action_BD))


def targets_of(
    target: CriticsFn,
    transition: Transition,
    behind: Drawn,
    *,
    masks: tuple[Tensor, ...],
    alpha: Tensor,
) -> Tensor:
    """Returns what Q should be [B], with `behind` drawn at the next observations."""
    q_NB = target(transition.next_observation, behind.action, masks)
    return soft_targets(
        # Entropies of the states between, by the policy that acted, so that n steps do not change
        # what Q means.
        transition.reward + alpha * transition.surprise,
        transition.discount,
        q_NB,
        behind.log_prob,
        alpha,
    )


def critics_objective(
    critics: CriticsFn,
    transition: Transition,
    *,
    target_B: Tensor,
    weight_B: Tensor,
    masks: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """Returns the loss of the critics, and Q [N, B]."""
    q_NB = critics(transition.observation, transition.action, masks)
    return critics_loss(q_NB, target_B, weight_B), q_NB


def actor_objective(
    actor: ActorFn,
    critics: CriticsFn,
    transition: Transition,
    *,
    draws: Draws,
    alpha: Tensor,
    policy: SquashedNormal,
) -> tuple[Tensor, Tensor]:
    """Returns the loss of the actor, and log-probabilities [B] of the actions that it draws."""
    drawn = draw_actions(actor, transition.observation, draws.noise, policy)
    q_NB = critics(transition.observation, drawn.action, draws.actor_masks)
    return soft_policy_loss(q_NB, drawn.log_prob, alpha), drawn.log_prob
