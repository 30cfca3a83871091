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

Everything steps in place, and nothing here draws, or asks Python for a number on the way: what
chance has in an update comes in as `Draws`. Modules are called as they are and autograd
differentiates them, compiled or not; it all runs under `torch.no_grad` but for the losses.

Shape suffixes: N = critics, B = transitions, P = parameters of the policy, D = components of an
action, H = width of a hidden layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from headrace.algorithms.functional_adam import FunctionalAdam
from headrace.algorithms.optimizers import OptimizerConfig
from headrace.algorithms.transitions import Transition
from headrace.networks.modes import in_eval_mode
from headrace.ops.soft_values import (
    critics_loss,
    move_towards,
    soft_policy_loss,
    soft_targets,
    temperature_loss,
)
from headrace.ops.squashed_normal import SquashedNormal


class Draws(NamedTuple):
    """What chance has in one update. Masks are each [N, B, H]; () where nothing is dropped."""

    next_noise: Tensor  # [B, D] standard normal, of the actions behind
    noise: Tensor  # [B, D] standard normal, of the actions that the actor learns from
    target_masks: tuple[Tensor, ...]  # of the target critics
    masks: tuple[Tensor, ...]  # of the critics that learn
    actor_masks: tuple[Tensor, ...]  # of the critics that the actor learns from


class Inputs(NamedTuple):
    """What an update learns from; or those of one call, one after the other: B is of all then."""

    transition: Transition
    draws: Draws
    weight: Tensor  # [B]
    scale: Tensor  # [2] of `FunctionalAdam`; of several updates, [updates, 2]


class Drawn(NamedTuple):
    """Actions of the policy as it is."""

    action: Tensor  # [B, D] before the squash
    log_prob: Tensor  # [B]


class Proposed(NamedTuple):
    """What the actor says before anybody learns."""

    here: Drawn
    behind: Drawn  # at the next observations
    alpha: Tensor  # scalar


class Judged(NamedTuple):
    """What the critics say of the actor's actions."""

    least_mean: Tensor  # scalar
    slope: Tensor  # [B, D] of that, by the action before the squash


class CriticsLearned(NamedTuple):
    """What an update says of the critics; scalars but for the last."""

    loss: Tensor
    norm: Tensor  # of the gradient, before the clip
    q_mean: Tensor
    target_mean: Tensor
    td_error: Tensor  # [B] mean over critics, absolute


class ActorLearned(NamedTuple):
    """What it says of the actor; scalars."""

    loss: Tensor
    norm: Tensor  # of the gradient, before the clip
    log_prob_mean: Tensor  # of actions drawn now
    alpha: Tensor  # that the losses saw


class Learned(NamedTuple):
    """What one update says of itself."""

    critics: CriticsLearned
    actor: ActorLearned


class ActorSide:
    """The policy and the temperature."""

    def __init__(
        self,
        actor: nn.Module,
        log_alpha: nn.Parameter,
        optimizer: OptimizerConfig,
        *,
        policy: SquashedNormal,
        target_entropy: float,
        temperature: float | None,
    ) -> None:
        """Takes what learns, on its device; a temperature is fixed, None is fitted."""
        self.log_alpha = log_alpha
        self._actor, self._policy, self._target_entropy = actor, policy, target_entropy
        self.optimizer = FunctionalAdam(learning_parameters(actor), optimizer)
        self.alpha_optimizer = FunctionalAdam({"log_alpha": log_alpha}, optimizer)
        self._fixed_alpha: Tensor | None = None
        if temperature is not None:
            self._fixed_alpha = torch.tensor(temperature, device=log_alpha.device)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.log_alpha.device

    @property
    def alpha(self) -> Tensor:
        """The temperature now: a constant, scalar."""
        return self.log_alpha.detach().exp() if self._fixed_alpha is None else self._fixed_alpha

    def draw(self, rows: Tensor, noise_BD: Tensor) -> Drawn:
        """Makes actions of noise."""
        parameters_BP = self._actor(rows)
        action_BD = self._policy.placed(parameters_BP, noise_BD)
        return Drawn(action_BD, self._policy.log_prob(parameters_BP, action_BD))

    def behind(self, inputs: Inputs) -> Drawn:
        """Draws the actions that targets are made of, in eval mode."""
        with in_eval_mode(self._actor):
            return self.draw(inputs.transition.next_observation, inputs.draws.next_noise)

    def propose(self, inputs: Inputs) -> Proposed:
        """Draws actions here and behind."""
        here = self.draw(inputs.transition.observation, inputs.draws.noise)
        return Proposed(here, self.behind(inputs), self.alpha)

    def learn_by_slope(self, inputs: Inputs, judged: Judged) -> ActorLearned:
        """Takes a step, of critics known by their slope alone.

        The policy runs a second time, which is cheaper than to carry what lies between its layers.
        """
        alpha = self.alpha
        with torch.enable_grad():
            drawn = self.draw(inputs.transition.observation, inputs.draws.noise)
            entropy_part = alpha * drawn.log_prob.mean()
            loss = entropy_part - (judged.slope * drawn.action).sum()
        said = entropy_part.detach() - judged.least_mean
        return self._step(inputs, loss, drawn, alpha)._replace(loss=said)

    def learn(self, critics: CriticSide, inputs: Inputs) -> ActorLearned:
        """Takes a step by the critics as they are."""
        alpha = self.alpha
        with torch.enable_grad():
            drawn = self.draw(inputs.transition.observation, inputs.draws.noise)
            masks = inputs.draws.actor_masks
            q_NB = critics.q(inputs.transition.observation, drawn.action, masks)
            loss = soft_policy_loss(q_NB, drawn.log_prob, alpha)
        return self._step(inputs, loss, drawn, alpha)

    def _step(self, inputs: Inputs, loss: Tensor, drawn: Drawn, alpha: Tensor) -> ActorLearned:
        norm = self.optimizer.step(self.optimizer.gradients(loss), inputs.scale)
        log_prob_B = drawn.log_prob.detach()
        if self._fixed_alpha is None:
            # The loss is proportional to alpha, so it is its own slope by the log.
            slope = temperature_loss(self.log_alpha, log_prob_B, self._target_entropy)
            self.alpha_optimizer.step([slope], inputs.scale)
        return ActorLearned(loss.detach(), norm, log_prob_B.mean(), alpha)


class CriticSide:
    """The critics and their targets."""

    def __init__(
        self, critics: nn.Module, target: nn.Module, optimizer: OptimizerConfig, *, tau: float
    ) -> None:
        """Takes what learns and what follows it by the share `tau`, on their device."""
        self._critics, self._target, self._tau = critics, target, tau
        self.optimizer = FunctionalAdam(learning_parameters(critics), optimizer)
        followers = dict(target.named_parameters())
        self.target_params = {name: followers[name] for name in self.optimizer.params}

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return next(self._critics.parameters()).device

    def q(self, rows: Tensor, action_BD: Tensor, masks: tuple[Tensor, ...]) -> Tensor:
        """Returns Q [N, B] by the weights as they are."""
        q_NB: Tensor = self._critics(rows, action_BD, masks)
        return q_NB

    def judge(self, inputs: Inputs, action_BD: Tensor) -> Judged:
        """Says how good the actor's actions are, and which way is better."""
        with torch.enable_grad():
            leaf_BD = action_BD.detach().requires_grad_()
            q_NB = self.q(inputs.transition.observation, leaf_BD, inputs.draws.actor_masks)
            least_mean = q_NB.amin(dim=0).mean()
        return Judged(least_mean.detach(), torch.autograd.grad(least_mean, leaf_BD)[0])

    def learn(self, inputs: Inputs, behind: Drawn, alpha: Tensor) -> CriticsLearned:
        """Takes a step, and moves the targets; `behind` was drawn at the next observations."""
        transition, draws = inputs.transition, inputs.draws
        target_B = soft_targets(
            # Entropies of the states between, by the policy that acted, so that n steps do not
            # change what Q means.
            transition.reward + alpha * transition.surprise,
            transition.discount,
            self._target(transition.next_observation, behind.action, draws.target_masks),
            behind.log_prob,
            alpha,
        )
        with torch.enable_grad():
            q_NB = self.q(transition.observation, transition.action, draws.masks)
            loss = critics_loss(q_NB, target_B, inputs.weight)
        norm = self.optimizer.step(self.optimizer.gradients(loss), inputs.scale)
        move_towards(
            list(self.target_params.values()), list(self.optimizer.params.values()), self._tau
        )
        q_NB = q_NB.detach()
        td_error_B = (q_NB - target_B).abs().mean(dim=0)
        return CriticsLearned(loss.detach(), norm, q_NB.mean(), target_B.mean(), td_error_B)


def learn_in_sequence(actor: ActorSide, critics: CriticSide, inputs: Inputs) -> Learned:
    """Critics first, then the actor by critics that are new: both on one device."""
    of_critics = critics.learn(inputs, actor.behind(inputs), actor.alpha)
    return Learned(of_critics, actor.learn(critics, inputs))


def learning_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters of a module that are not frozen, by name."""
    return {name: param for name, param in module.named_parameters() if param.requires_grad}
