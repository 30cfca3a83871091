"""SAC: soft actor-critic, off-policy, from single transitions.

Source: Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications", arXiv:1812.05905,
algorithm 1: critics, then actor and temperature with the critics that are new, then targets. A
clock that cuts an episode is not its end: the value of the final observation goes into the target.

    target <- (1 - tau) target + tau online

Actions are those before the squash; entropies are of actions in [-1, 1], in nats, as published.

Shape suffixes: T = n steps, B = transitions, N = critics, D = components of an action.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import torch
from torch import Tensor, nn

from headrace.algorithms.acting import act_by_policy
from headrace.algorithms.base import ActionMode, ExperienceSpec, Model, ReplaySpec
from headrace.algorithms.optimizers import (
    learning_rate_at,
    load_optimizer,
    make_optimizer,
    step_with,
)
from headrace.algorithms.sac_config import SacConfig
from headrace.algorithms.sac_objectives import (
    Draws,
    actor_objective,
    critics_objective,
    targets_of,
)
from headrace.algorithms.transitions import Transition, transitions
from headrace.errors import ConfigError
from headrace.networks.actor_critics import ActorCriticsNet
from headrace.ops.rewards import transform_reward
from headrace.ops.soft_values import move_towards, temperature_loss
from headrace.ops.squashed_normal import SquashedNormal
from headrace.records import Batch, PolicyInput, PolicyStep, Update
from headrace.specs import EnvSpec

__all__ = ["Sac", "SacConfig"]

_PIECE_STEPS = 16  # a piece of experience costs as much to hand over as ten steps
_LEAST_PRIORITY = 1e-6
"""Added to all priorities: a transition without an error must not be lost for good."""


class CriticGradient(NamedTuple):
    """What one batch says of the critics."""

    grads: tuple[Tensor, ...]
    loss: Tensor  # scalar
    q: Tensor  # [N, B]
    target: Tensor  # [B]


class ActorGradient(NamedTuple):
    """What one batch says of the actor."""

    grads: tuple[Tensor, ...]
    loss: Tensor  # scalar
    log_prob: Tensor  # [B] of actions drawn now


class Sac:
    """Acts by sampling the policy; learns soft Q, and the policy that makes most of it."""

    config_type = SacConfig
    heads = "actor_critics"

    def __init__(
        self,
        model: nn.Module,
        config: SacConfig,
        *,
        spec: EnvSpec,
        precision: torch.dtype = torch.float32,
    ) -> None:
        """Takes the networks that learn, and makes the target critics of them.

        Args:
            model: An actor and critics.
            config: The learning rule's settings.
            spec: Of the environment.
            precision: Of nothing here: `ActorCriticsNet` is float32 all through.

        Raises:
            ConfigError: actions are not continuous, or the model has no critics.
        """
        space = spec.action_space
        if not isinstance(space, gym.spaces.Box):
            raise ConfigError(
                f"{spec.name}: sac needs continuous actions, not {space}: use --algorithm r2d2, "
                "impala or ppo"
            )
        if not isinstance(model, ActorCriticsNet):
            raise ConfigError(
                f"sac needs a headrace.networks.actor_critics.ActorCriticsNet, not a "
                f"{type(model).__name__}: leave out --heads, and build networks of your own with "
                "headrace.networks.models.assemble"
            )
        self.model = model
        self.target_critics = copy.deepcopy(model.critics).requires_grad_(False)
        self.experience = ExperienceSpec(
            unroll_steps=_PIECE_STEPS,
            batch_unrolls=config.batch_unrolls,
            replay=ReplaySpec(
                sequence_steps=config.n_steps,
                stride_steps=1,
                burn_in_steps=0,
                learned_steps=1,
                settings=config.replay,
            ),
        )
        self._config = config
        self._policy = SquashedNormal(tuple(space.low.tolist()), tuple(space.high.tolist()))
        wanted = config.target_entropy
        self._target_entropy = -float(self._policy.encoded_size) if wanted is None else wanted
        device = next(model.parameters()).device
        self._fixed_alpha: Tensor | None = None
        if config.temperature is not None:
            self._fixed_alpha = torch.tensor(config.temperature, device=device)
        start = math.log(config.initial_temperature)
        self._log_alpha = nn.Parameter(torch.tensor(start, device=device))
        self._critic_optimizer = make_optimizer(model.critics.parameters(), config.optimizer)
        self._actor_optimizer = make_optimizer(model.actor.parameters(), config.optimizer)
        self._alpha_optimizer = make_optimizer([self._log_alpha], config.optimizer)
        self._generator = torch.Generator(device)
        self._generator.manual_seed(0)

    def act(
        self,
        model: Model,
        inputs: PolicyInput,
        recurrent: tuple[Tensor, ...],
        *,
        mode: ActionMode,
        generator: torch.Generator | None = None,
        epsilon: float | Tensor = 0.0,
    ) -> tuple[PolicyStep, tuple[Tensor, ...]]:
        """Acts by the policy; see `act_by_policy`. Values are 0: learning needs none of them."""
        return act_by_policy(
            self._policy,
            model,
            inputs,
            recurrent,
            mode=mode,
            generator=generator,
            epsilon=epsilon,
        )

    @property
    def alpha(self) -> Tensor:
        """The temperature now: a constant, scalar."""
        return self._log_alpha.detach().exp() if self._fixed_alpha is None else self._fixed_alpha

    def transition(self, batch: Batch) -> Transition:
        """Makes transitions of a batch, as the networks see them."""
        config = self._config
        reward_TB = transform_reward(config.reward_scale * batch.reward, config.reward_transform)
        raw = transitions(batch, reward_TB, discount=config.discount)
        return raw._replace(
            observation=self.model.rows(raw.observation),
            next_observation=self.model.rows(raw.next_observation),
        )

    def draw(self, batch: int) -> Draws:
        """Draws what an update of `batch` transitions needs."""
        components = self._policy.encoded_size
        device = self._log_alpha.device

        def noise() -> Tensor:
            return torch.randn(batch, components, device=device, generator=self._generator)

        def masks() -> tuple[Tensor, ...]:
            return self.model.critics.dropout_masks(batch, self._generator)

        return Draws(noise(), noise(), masks(), masks(), masks())

    def critic_gradient(
        self, transition: Transition, draws: Draws, weight_B: Tensor
    ) -> CriticGradient:
        """Differentiates the critics' loss."""
        critics = self.model.critics
        target_B = targets_of(
            self.model.actor,
            self.target_critics,
            transition,
            draws=draws,
            alpha=self.alpha,
            policy=self._policy,
        )
        loss, q_NB = critics_objective(
            critics, transition, target_B=target_B, weight_B=weight_B, masks=draws.masks
        )
        grads = torch.autograd.grad(loss, list(critics.parameters()))
        return CriticGradient(grads, loss.detach(), q_NB.detach(), target_B)

    def actor_gradient(self, transition: Transition, draws: Draws) -> ActorGradient:
        """Differentiates the actor's loss; the critics are what they are now."""
        actor = self.model.actor
        loss, log_prob_B = actor_objective(
            actor,
            self.model.critics,
            transition,
            draws=draws,
            alpha=self.alpha,
            policy=self._policy,
        )
        grads = torch.autograd.grad(loss, list(actor.parameters()))
        return ActorGradient(grads, loss.detach(), log_prob_B.detach())

    def update(self, batch: Batch, *, progress: float) -> Update:
        """Takes one step with critics, actor and temperature, and moves the targets."""
        learning_rate = learning_rate_at(self._config.optimizer, progress)
        transition = self.transition(batch)
        draws = self.draw(len(transition.reward))
        alpha = self.alpha.clone()
        critic = self.critic_gradient(transition, draws, _weights(batch, transition))
        critic_norm = self._step(self._critic_optimizer, critic.grads, learning_rate)
        actor = self.actor_gradient(transition, draws)
        actor_norm = self._step(self._actor_optimizer, actor.grads, learning_rate)
        self._fit_temperature(actor.log_prob, learning_rate)
        self._move_targets()
        # Last: the losses saw by the statistics of before.
        self.model.observe(batch.inputs.observation[:1, :, -1])
        td_error_B = (critic.q - critic.target).abs().mean(dim=0)
        metrics = {
            "loss/critic": critic.loss,
            "loss/actor": actor.loss,
            "loss/entropy": -actor.log_prob.mean(),
            "loss/td_error_mean": td_error_B.mean(),
            "temperature": alpha,
            "value_mean": critic.q.mean(),
            "target_mean": critic.target.mean(),
            "truncated_skipped": (~transition.known).sum().float(),
            "gradient_norm": critic_norm,
            "gradient_norm_actor": actor_norm,
            "learning_rate": torch.tensor(learning_rate),
        }
        finite = torch.stack((critic.loss, actor.loss, critic_norm, actor_norm)).isfinite().all()
        priority_B = None
        if self._config.replay.priority_exponent:
            priority_B = td_error_B * transition.known + _LEAST_PRIORITY
        return Update(metrics, finite, priority_B)

    def warm_up(self, batch: Batch) -> None:
        """Runs both gradients once, and forgets them; draws nothing."""
        transition = self.transition(batch)
        noise_BD = torch.zeros_like(transition.action)
        draws = Draws(noise_BD, noise_BD, (), (), ())
        self.critic_gradient(transition, draws, _weights(batch, transition))
        self.actor_gradient(transition, draws)

    def state_dict(self) -> dict[str, Any]:
        """Returns optimisers, target critics, temperature and the state of the draws."""
        return {
            "critic_optimizer": self._critic_optimizer.state_dict(),
            "actor_optimizer": self._actor_optimizer.state_dict(),
            "alpha_optimizer": self._alpha_optimizer.state_dict(),
            "target": dict(self.target_critics.state_dict()),
            "log_alpha": self._log_alpha.detach(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        load_optimizer(self._critic_optimizer, state["critic_optimizer"])
        load_optimizer(self._actor_optimizer, state["actor_optimizer"])
        load_optimizer(self._alpha_optimizer, state["alpha_optimizer"])
        self.target_critics.load_state_dict(state["target"])
        with torch.no_grad():
            self._log_alpha.copy_(state["log_alpha"])
        self._generator.set_state(state["generator"].cpu())

    def _step(
        self, optimizer: torch.optim.Optimizer, grads: Sequence[Tensor], learning_rate: float
    ) -> Tensor:
        max_norm = self._config.optimizer.max_gradient_norm
        return step_with(optimizer, grads, learning_rate=learning_rate, max_norm=max_norm)

    def _fit_temperature(self, log_prob_B: Tensor, learning_rate: float) -> None:
        if self._fixed_alpha is None:
            loss = temperature_loss(self._log_alpha, log_prob_B, self._target_entropy)
            grads = torch.autograd.grad(loss, [self._log_alpha])
            self._step(self._alpha_optimizer, grads, learning_rate)

    def _move_targets(self) -> None:
        online, target = self.model.critics, self.target_critics
        move_towards(list(target.parameters()), list(online.parameters()), self._config.target_tau)
        for kept, now in zip(target.buffers(), online.buffers(), strict=True):
            kept.copy_(now)


def _weights(batch: Batch, transition: Transition) -> Tensor:
    """How much each transition counts [B]: those without a known end, nothing."""
    known_B = transition.known.float()
    return known_B if batch.weight is None else batch.weight * known_B
