"""TD3: deterministic actor, two critics, off-policy, from single transitions.

Source: Fujimoto et al. 2018, "Addressing Function Approximation Error in Actor-Critic Methods",
arXiv:1802.09477, algorithm 1. A clock that cuts an episode is not its end: the value of the final
observation goes into the target.

The actor is SAC's, whose mean is all that is used of it. Actions are those before the squash;
noises are of squashed ones, in [-1, 1].

Shape suffixes: B = transitions, N = critics (acting: environments), D = components of an action.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headrace.algorithms.acting import some_of
from headrace.algorithms.base import ActionMode, Algorithm, Model, ReplayConfig, ShownMetrics
from headrace.algorithms.minibatches import load_generator
from headrace.algorithms.optimizers import (
    OptimizerConfig,
    check_no_kl,
    clipped_step,
    hidden_weights,
    learning_rate_at,
    load_optimizer,
    make_optimizer,
)
from headrace.algorithms.sac import plain_adam, uniform_replay
from headrace.algorithms.transitions import (
    LEAST_PRIORITY,
    Transition,
    experience_of,
    seen_by,
    sides_of,
)
from headrace.errors import ConfigError
from headrace.networks.actor_critics import ActorCriticsNet
from headrace.networks.modes import frozen
from headrace.ops.soft_values import critics_loss, move_towards
from headrace.ops.squashed_normal import unsquashed
from headrace.records import Batch, PolicyInput, PolicyStep, Update
from headrace.specs import EnvSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Td3Config:
    """The learning rule's settings."""

    batch_unrolls: int = 256
    """Makes an update of so many transitions (B): samples_per_insert / B for an agent step."""
    discount: float = 0.99
    """Multiplies rewards one agent step later by this (gamma)."""
    target_tau: float = 0.005
    """Moves the targets by this share towards what learns, whenever the actor learns."""
    policy_delay: int = 2
    """Updates the critics so many times for one update of actor and targets."""
    exploration_noise: float = 0.1
    """Sets the deviation of the noise on actions (in [-1, 1]) of environments that train."""
    target_noise: float = 0.2
    """Sets the deviation of the noise on the target actor's actions (in [-1, 1])."""
    target_noise_clip: float = 0.5
    """Clips the noise on the target actor's actions to this size."""
    reward_transform: Literal["none", "clip", "soft_asymmetric"] = "none"
    """Changes rewards: none, clip (to [-1, 1]), or soft_asymmetric (of the IMPALA authors)."""
    reward_scale: float = 1.0
    """Multiplies raw rewards, before `reward_transform`: a clip bites on what it makes."""
    optimizer: OptimizerConfig = field(default_factory=plain_adam)
    """How gradients become steps: for critics and actor, each on its own."""
    replay: ReplayConfig = field(default_factory=uniform_replay)
    """What is kept, and how it is sampled; a sequence is one transition."""

    def __post_init__(self) -> None:
        noises = (self.exploration_noise, self.target_noise, self.target_noise_clip)
        if not all(map(math.isfinite, (*noises, self.reward_scale))) or min(noises) < 0:
            raise ConfigError("noises and reward_scale must be finite, and noises not negative")
        if min(self.batch_unrolls, self.policy_delay) < 1:
            raise ConfigError("batch_unrolls and policy_delay must be at least 1")
        if not 0 <= self.discount <= 1 or not 0 < self.target_tau <= 1:
            raise ConfigError("discount must be in [0, 1], and target_tau above 0 and at most 1")
        check_no_kl(self.optimizer, "td3")


class Td3(Algorithm):
    """Acts by the actor and noise; learns the least Q of critics, and what makes most of it."""

    config_type = Td3Config
    heads = "actor_critics"
    averages_gradients = True
    shown = ShownMetrics(
        panel=(
            ("critics' loss", "loss/critic"),
            ("actor's loss", "loss/actor"),
            ("TD error", "loss/td_error_mean"),
            ("value", "value_mean"),
        ),
        line=("TD error", "loss/td_error_mean"),
    )
    model: ActorCriticsNet
    target_model: ActorCriticsNet

    def __init__(
        self, model: nn.Module, config: Td3Config, *, spec: EnvSpec, precision: torch.dtype
    ) -> None:
        """Takes the networks that learn; `precision` is of products between their hidden layers."""
        model, self._policy = sides_of("td3", model, spec)
        model.set_products(precision)
        super().__init__(model, experience_of(config, steps=1))
        self.target_model = frozen(copy.deepcopy(model))
        self._config = config
        self._optimizers = {
            name: make_optimizer(side.parameters(), config.optimizer, hidden=hidden_weights(side))
            for name, side in (("critics", model.critics), ("actor", model.actor))
        }
        device = next(model.parameters()).device
        self._generator = torch.Generator(device).manual_seed(0)
        self._updates, self._actor_loss = 0, torch.zeros((), device=device)

    def compiled(self) -> list[nn.Module]:
        """Returns what updates call: actor and critics, of the targets too."""
        networks = self.model, self.target_model
        return [side for one in networks for side in (one.actor, one.critics)]

    def draw_apart(self, seed: int) -> None:
        """Draws its noise by this seed."""
        self._generator.manual_seed(seed)

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
        """Takes the actor's action; "sample" adds noise, "epsilon" random ones. Values are 0."""
        output, recurrent = model(inputs, recurrent)
        parameters: Tensor = output.parameters[0]
        action_ND = self._policy.greedy(parameters)
        if mode == "sample":
            noise_ND = torch.empty_like(action_ND).normal_(generator=generator)
            action_ND = unsquashed(action_ND.tanh() + self._config.exploration_noise * noise_ND)
        elif mode == "epsilon":
            uniform_ND = self._policy.uniform(parameters, generator=generator)
            action_ND = some_of(uniform_ND, action_ND, share=epsilon, generator=generator)
        zero_N, told_ND = output.value[0], self._policy.to_env(action_ND)
        return PolicyStep(action_ND, zero_N, zero_N, told_ND), recurrent

    @torch.no_grad()
    def targets(self, transition: Transition) -> Tensor:
        """Returns what Q should be [B], by the target actor's actions with noise."""
        config, target, clip = self._config, self.target_model, self._config.target_noise_clip
        mean_BD = self._policy.greedy(target.actor(transition.next_observation))
        noise_BD = torch.empty_like(mean_BD).normal_(generator=self._generator)
        noise_BD = (config.target_noise * noise_BD).clamp(-clip, clip)
        action_BD = unsquashed(mean_BD.tanh() + noise_BD)
        q_NB = target.critics(transition.next_observation, action_BD, self._masks(transition))
        return torch.addcmul(transition.reward, transition.discount, q_NB.amin(dim=0))

    def critics_loss(
        self, transition: Transition, weight: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the loss, Q [N, B] and targets [B]; transitions without a known end count 0."""
        target_B, masks = self.targets(transition), self._masks(transition)
        q_NB = self.model.critics(transition.observation, transition.action, masks)
        weight_B = transition.known * (1.0 if weight is None else weight)
        return critics_loss(q_NB, target_B, weight_B), q_NB.detach(), target_B

    def actor_loss(self, transition: Transition) -> Tensor:
        """Returns minus the mean of the first critic's Q of the actor's actions."""
        mean_BD, _ = self.model.actor(transition.observation).chunk(2, dim=-1)
        q_NB = self.model.critics(transition.observation, mean_BD, self._masks(transition))
        return -q_NB[0].mean()  # type: ignore[no-any-return]

    def update(self, batch: Batch, *, progress: float) -> Update:
        """Takes a step with the critics, and one with actor and targets if it is time."""
        config, transition = self._config, seen_by(self.model, batch, self._config)
        learning_rate = learning_rate_at(config.optimizer, progress)
        loss, q_NB, target_B = self.critics_loss(transition, batch.weight)
        norm = self._step("critics", loss, learning_rate)
        finite = torch.isfinite(loss.detach() + norm)
        self._updates += 1
        if self._updates % config.policy_delay == 0:
            actor_loss = self.actor_loss(transition)
            finite &= torch.isfinite(self._step("actor", actor_loss, learning_rate))
            self._actor_loss = actor_loss.detach()
            target, online = (list(x.parameters()) for x in (self.target_model, self.model))
            move_towards(target, online, config.target_tau)
        # Last: the losses saw by the statistics of before.
        self.model.observe(batch.inputs.observation[:1, :, -1])
        for kept, now in zip(self.target_model.buffers(), self.model.buffers(), strict=True):
            kept.copy_(now)
        td_error_B = (q_NB - target_B).abs().mean(dim=0)
        metrics = {
            "loss/critic": loss.detach(),
            "loss/actor": self._actor_loss,
            "loss/td_error_mean": td_error_B.mean(),
            "value_mean": q_NB.mean(),
            "truncated_skipped": (~transition.known).sum().float(),
            "gradient_norm": norm,
            "learning_rate": torch.tensor(learning_rate),
        }
        by_priority = config.replay.priority_exponent > 0
        priority_B = td_error_B * transition.known + LEAST_PRIORITY if by_priority else None
        return Update(metrics, finite, priority_B)

    def warm_up(self, batch: Batch) -> None:
        """Runs both losses and their gradients once, and forgets them; draws nothing."""
        drawn, transition = self._generator.get_state(), seen_by(self.model, batch, self._config)
        loss = self.critics_loss(transition, batch.weight)[0] + self.actor_loss(transition)
        torch.autograd.backward(loss)
        self.model.zero_grad(set_to_none=True)
        self._generator.set_state(drawn)

    def state_dict(self) -> dict[str, Any]:
        """Returns optimisers, targets, the number of updates and the state of the draws."""
        return {
            **{name: optimizer.state_dict() for name, optimizer in self._optimizers.items()},
            "target": dict(self.target_model.state_dict()),
            "updates": self._updates,
            "actor_loss": self._actor_loss,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave; on another kind of device, all but the draws."""
        for name, optimizer in self._optimizers.items():
            load_optimizer(optimizer, state[name])
        self.target_model.load_state_dict(state["target"])
        self._updates = state["updates"]
        self._actor_loss = state["actor_loss"].to(self._actor_loss.device)
        load_generator(self._generator, state["generator"])

    def _step(self, side: str, loss: Tensor, learning_rate: float) -> Tensor:
        optimizer, clip = self._optimizers[side], self._config.optimizer.max_gradient_norm
        return clipped_step(
            optimizer, loss, learning_rate=learning_rate, max_norm=clip, learners=self.learners
        )

    def _masks(self, transition: Transition) -> tuple[Tensor, ...]:
        return self.model.critics.dropout_masks(len(transition.reward), self._generator)
