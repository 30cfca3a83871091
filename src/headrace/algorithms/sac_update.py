"""One update of SAC, from transitions to new weights: functions that a compiler takes whole.

Two sides, which may lie on two devices and exchange only what the losses need:

```
actor side                                     critic side
policy, temperature, their moments             critics, their targets and moments

propose   actions here and behind  ─────────▶  judge   slope of the least Q by the action
learn     chain rule through it   ◀─────────
                                               learn   targets, loss, step; targets move
```
Sequential: critics learn, then the actor learns from the critics that are new, as published.
Simultaneous: both learn from the critics of before, so that neither waits for the other's step.

Everything steps in place, and nothing here asks Python for a number on the way. A compiler sees
functions of weights (`torch.func`); without one the modules are called as they are, and autograd
differentiates them, which costs less there.

Shape suffixes: N = critics, B = transitions, D = components of an action.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from headrace.algorithms.functional_adam import FunctionalAdam
from headrace.algorithms.sac_config import SacConfig
from headrace.algorithms.sac_objectives import (
    Drawn,
    Draws,
    actor_objective,
    critics_objective,
    draw_actions,
    targets_of,
)
from headrace.algorithms.transitions import Transition
from headrace.networks.modes import in_eval_mode
from headrace.ops.soft_values import move_towards, temperature_loss
from headrace.ops.squashed_normal import SquashedNormal

Params = dict[str, Tensor] | None
"""Weights by name; None for those that the module has."""


class Learned(NamedTuple):
    """What one update says of itself; scalars but for the last."""

    critic_loss: Tensor
    critic_norm: Tensor  # of the gradient, before the clip
    q_mean: Tensor
    target_mean: Tensor
    actor_loss: Tensor
    actor_norm: Tensor
    log_prob_mean: Tensor  # of actions drawn now
    alpha: Tensor  # that the losses saw
    td_error: Tensor  # [B] mean over critics, absolute


class CriticsLearned(NamedTuple):
    """The critics' share of it."""

    loss: Tensor
    norm: Tensor
    q_mean: Tensor
    target_mean: Tensor
    td_error: Tensor  # [B]


class ActorLearned(NamedTuple):
    """The actor's."""

    norm: Tensor
    log_prob_mean: Tensor


class Judged(NamedTuple):
    """What the critics say of the actor's actions."""

    least_mean: Tensor  # scalar
    slope: Tensor  # [B, D] of that, by the action before the squash


class Proposed(NamedTuple):
    """What the actor says before anybody learns."""

    here: Drawn
    behind: Drawn  # at the next observations
    alpha: Tensor  # scalar


class ActorSide:
    """The policy and the temperature."""

    def __init__(
        self,
        actor: nn.Module,
        log_alpha: nn.Parameter,
        config: SacConfig,
        *,
        policy: SquashedNormal,
        target_entropy: float,
    ) -> None:
        """Takes what learns, on its device."""
        self.actor, self.log_alpha = actor, log_alpha
        self.policy, self.target_entropy = policy, target_entropy
        self.optimizer = FunctionalAdam(learning_parameters(actor), config.optimizer)
        self.alpha_optimizer = FunctionalAdam({"log_alpha": log_alpha}, config.optimizer)
        self.fixed_alpha: Tensor | None = None
        if config.temperature is not None:
            self.fixed_alpha = torch.tensor(config.temperature, device=log_alpha.device)

    @property
    def alpha(self) -> Tensor:
        """The temperature now: a constant, scalar."""
        return self.log_alpha.detach().exp() if self.fixed_alpha is None else self.fixed_alpha

    def act(self, params: Params, rows: Tensor) -> Tensor:
        """Returns parameters of the policy for `rows`, by weights."""
        return _called(self.actor, params, rows)

    def drawn(self, rows: Tensor, noise_BD: Tensor) -> Drawn:
        """Draws actions by the weights as they are."""
        return draw_actions(
            lambda seen: self.act(_own(self.optimizer), seen), rows, noise_BD, self.policy
        )

    def behind(self, transition: Transition, draws: Draws) -> Drawn:
        """Draws the actions that targets are made of, in eval mode."""
        with in_eval_mode(self.actor):
            return self.drawn(transition.next_observation, draws.next_noise)

    def propose(self, transition: Transition, draws: Draws) -> Proposed:
        """Draws actions here and behind."""
        return Proposed(
            self.drawn(transition.observation, draws.noise),
            self.behind(transition, draws),
            self.alpha,
        )

    def learn_by_slope(
        self, transition: Transition, draws: Draws, slope_BD: Tensor, scale: Tensor
    ) -> ActorLearned:
        """Takes a step, of critics known by their slope alone.

        The policy runs a second time, which is cheaper than to carry what lies between its layers.
        """
        alpha = self.alpha

        def objective(params: Params) -> tuple[Tensor, Tensor]:
            drawn = draw_actions(
                lambda seen: self.act(params, seen),
                transition.observation,
                draws.noise,
                self.policy,
            )
            loss = alpha * drawn.log_prob.mean() - (slope_BD * drawn.action).sum()
            return loss, drawn.log_prob

        grads, _, log_prob_B = _differentiated(objective, self.actor, self.optimizer)
        return self._step(grads, log_prob_B, alpha, scale)

    def learn(
        self, critics: CriticSide, transition: Transition, draws: Draws, scale: Tensor
    ) -> tuple[Tensor, ActorLearned]:
        """Takes a step by the critics as they are; returns the loss too."""
        alpha = self.alpha

        def objective(params: Params) -> tuple[Tensor, Tensor]:
            return actor_objective(
                lambda seen: self.act(params, seen),
                critics.q,
                transition,
                draws=draws,
                alpha=alpha,
                policy=self.policy,
            )

        grads, loss, log_prob_B = _differentiated(objective, self.actor, self.optimizer)
        return loss, self._step(grads, log_prob_B, alpha, scale)

    def _step(
        self, grads: Mapping[str, Tensor], log_prob_B: Tensor, alpha: Tensor, scale: Tensor
    ) -> ActorLearned:
        norm = self.optimizer.step(grads, scale)
        if self.fixed_alpha is None:
            # The loss is proportional to alpha, so it is its own slope by the log.
            log_alpha = self.alpha_optimizer.params["log_alpha"]
            slope = temperature_loss(log_alpha, log_prob_B, self.target_entropy)
            self.alpha_optimizer.step({"log_alpha": slope}, scale)
        return ActorLearned(norm, log_prob_B.mean())


class CriticSide:
    """The critics and their targets."""

    def __init__(self, critics: nn.Module, target: nn.Module, config: SacConfig) -> None:
        """Takes what learns and what follows it, on their device."""
        self.critics = critics
        self.target = target
        self.optimizer = FunctionalAdam(learning_parameters(critics), config.optimizer)
        followers = dict(target.named_parameters())
        self.target_params = {name: followers[name].detach() for name in self.optimizer.params}
        self._tau = config.target_tau

    def q(self, rows: Tensor, action_BD: Tensor, masks: tuple[Tensor, ...]) -> Tensor:
        """Returns Q [N, B] by the weights as they are."""
        return _called(self.critics, _own(self.optimizer), rows, action_BD, masks)

    def judge(self, transition: Transition, action_BD: Tensor, draws: Draws) -> Judged:
        """Says how good the actor's actions are, and which way is better."""

        def objective(action_BD: Tensor) -> Tensor:
            q_NB = self.q(transition.observation, action_BD, draws.actor_masks)
            return q_NB.amin(dim=0).mean()

        if torch.compiler.is_compiling():
            slope_BD, least_mean = torch.func.grad_and_value(objective)(action_BD)
            return Judged(least_mean, slope_BD)
        with torch.enable_grad():
            leaf_BD = action_BD.detach().requires_grad_()
            least_mean = objective(leaf_BD)
        return Judged(least_mean.detach(), torch.autograd.grad(least_mean, leaf_BD)[0])

    def learn(
        self,
        transition: Transition,
        behind: Drawn,
        *,
        alpha: Tensor,
        draws: Draws,
        weight_B: Tensor,
        scale: Tensor,
    ) -> CriticsLearned:
        """Takes a step, and moves the targets."""

        def target(rows: Tensor, action_BD: Tensor, masks: tuple[Tensor, ...]) -> Tensor:
            params = self.target_params if torch.compiler.is_compiling() else None
            return _called(self.target, params, rows, action_BD, masks)

        target_B = targets_of(target, transition, behind, masks=draws.target_masks, alpha=alpha)

        def objective(params: Params) -> tuple[Tensor, Tensor]:
            return critics_objective(
                lambda *inputs: _called(self.critics, params, *inputs),
                transition,
                target_B=target_B,
                weight_B=weight_B,
                masks=draws.masks,
            )

        grads, loss, q_NB = _differentiated(objective, self.critics, self.optimizer)
        norm = self.optimizer.step(grads, scale)
        move_towards(
            list(self.target_params.values()), list(self.optimizer.params.values()), self._tau
        )
        td_error_B = (q_NB - target_B).abs().mean(dim=0)
        return CriticsLearned(loss, norm, q_NB.mean(), target_B.mean(), td_error_B)


def learn_in_sequence(
    actor: ActorSide,
    critics: CriticSide,
    transition: Transition,
    *,
    draws: Draws,
    weight_B: Tensor,
    scale: Tensor,
) -> Learned:
    """Critics first, then the actor by critics that are new: both on one device."""
    alpha = actor.alpha
    behind = actor.behind(transition, draws)
    of_critics = critics.learn(
        transition, behind, alpha=alpha, draws=draws, weight_B=weight_B, scale=scale
    )
    loss, of_actor = actor.learn(critics, transition, draws, scale)
    return learned(of_critics, of_actor, loss, alpha)


def learned(
    of_critics: CriticsLearned, of_actor: ActorLearned, actor_loss: Tensor, alpha: Tensor
) -> Learned:
    """Puts both shares together."""
    return Learned(
        critic_loss=of_critics.loss,
        critic_norm=of_critics.norm,
        q_mean=of_critics.q_mean,
        target_mean=of_critics.target_mean,
        actor_loss=actor_loss,
        actor_norm=of_actor.norm,
        log_prob_mean=of_actor.log_prob_mean,
        alpha=alpha,
        td_error=of_critics.td_error,
    )


def learning_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters of a module that are not frozen, by name."""
    return {name: param for name, param in module.named_parameters() if param.requires_grad}


def _own(optimizer: FunctionalAdam) -> Params:
    """The weights to call a module with, as they are."""
    return optimizer.params if torch.compiler.is_compiling() else None


def _called(module: nn.Module, params: Params, *inputs: Any) -> Tensor:
    result: Tensor = module(*inputs) if params is None else functional_call(module, params, inputs)
    return result


def _differentiated(
    objective: Callable[[Params], tuple[Tensor, Tensor]],
    module: nn.Module,
    optimizer: FunctionalAdam,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Returns gradients by name, the loss, and what comes with it; constants."""
    if torch.compiler.is_compiling():
        differentiate = torch.func.grad_and_value(objective, has_aux=True)
        grads, (loss, beside) = differentiate(optimizer.params)
        return grads, loss, beside
    with torch.enable_grad():
        loss, beside = objective(None)
    found = torch.autograd.grad(
        loss,
        list(learning_parameters(module).values()),
        allow_unused=True,  # a torso of the user's may have weights that it does not use
        materialize_grads=True,
    )
    return dict(zip(optimizer.params, found, strict=True)), loss.detach(), beside.detach()
