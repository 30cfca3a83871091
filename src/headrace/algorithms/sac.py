"""SAC: soft actor-critic, off-policy, from single transitions.

Source: Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications", arXiv:1812.05905,
algorithm 1: critics, then actor and temperature with the critics that are new, then targets. A
clock that cuts an episode is not its end: the value of the final observation goes into the target.

    target <- (1 - tau) target + tau online

Actions are those before the squash; entropies are of actions in [-1, 1], in nats, as published.
The arithmetic of an update is in `sac_update`; here is what it is made of, and when.

Shape suffixes: T = n steps, B = transitions, N = critics, D = components of an action.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headrace.algorithms.acting import act_by_policy
from headrace.algorithms.base import (
    ActionMode,
    Algorithm,
    Capture,
    Learners,
    Model,
    ReplayConfig,
    ShownMetrics,
)
from headrace.algorithms.optimizers import OptimizerConfig, check_no_kl, learning_rate_at
from headrace.algorithms.sac_orders import Order, Sequential, Simultaneous
from headrace.algorithms.sac_update import ActorSide, CriticSide, Draws, Inputs, Learned
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
from headrace.records import Batch, PolicyInput, PolicyStep, Update
from headrace.specs import EnvSpec

_WORTH_COMPILING = 20_000  # updates: compiling takes half a minute, an update then half the time


def plain_adam() -> OptimizerConfig:
    """Adam as published: no schedule, no clip."""
    return OptimizerConfig(
        optimizer="adam",
        learning_rate=3e-4,
        learning_rate_schedule="constant",
        optimizer_eps=1e-8,
        max_gradient_norm=0.0,
    )


def uniform_replay() -> ReplayConfig:
    """A million transitions, all sampled alike, and an update for each."""
    return ReplayConfig(
        replay_capacity=1_000_000,
        replay_min=1_000,
        samples_per_insert=256.0,
        priority_exponent=0.0,
        importance_exponent=0.0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SacConfig:
    """The learning rule's settings, with published values as defaults."""

    batch_unrolls: int = 256
    """Makes an update of so many transitions (B). An agent step has samples_per_insert / B
    updates."""
    updates_per_call: int = 1
    """Takes so many updates in one go, on transitions sampled at once: there are as many as before,
    with less work between them; the acting policy is renewed after all of them."""
    update_order: Literal["auto", "sequential", "simultaneous"] = "auto"
    """Updates critics, then the actor by the new ones, as published (sequential), or both by those
    of before, as it must be on two devices (simultaneous). auto is sequential unless there are
    two."""
    discount: float = 0.99
    """Multiplies rewards one agent step later by this (gamma)."""
    n_steps: int = 1
    """Sums the rewards of so many agent steps in a target (n), before the value behind them; they
    are not corrected for the policy's age."""
    target_tau: float = 0.005
    """Moves the target critics by this share towards the critics that learn, at every update; 1
    makes them the same."""
    temperature: float | None = None
    """Fixes alpha, the weight of entropy beside rewards, for the whole run; None fits it to
    target_entropy."""
    initial_temperature: float = 1.0
    """Sets alpha at the start, where it is fitted."""
    target_entropy: float | None = None
    """Fits alpha to this mean entropy of the policy, in nats, of actions in [-1, 1]; None takes
    minus the number of their components."""
    reward_transform: Literal["none", "clip", "soft_asymmetric"] = "none"
    """Changes rewards before learning: none, clip (to [-1, 1]), or soft_asymmetric (the DMLab-30
    code of the IMPALA authors)."""
    reward_scale: float = 1.0
    """Multiplies raw rewards, before `reward_transform`: a clip bites on what it makes."""
    optimizer: OptimizerConfig = field(default_factory=plain_adam)
    """How gradients become steps: for critics, actor and temperature, each on its own."""
    replay: ReplayConfig = field(default_factory=uniform_replay)
    """What is kept, and how it is sampled; a sequence is one transition."""

    def __post_init__(self) -> None:
        numbers = (self.discount, self.target_tau, self.initial_temperature, self.reward_scale)
        optional = (self.temperature or 0.0, self.target_entropy or 0.0)
        if not all(map(math.isfinite, (*numbers, *optional))):
            raise ConfigError("settings of sac must be finite numbers")
        if min(self.batch_unrolls, self.n_steps, self.updates_per_call) < 1:
            raise ConfigError("batch_unrolls, n_steps and updates_per_call must be at least 1")
        if self.optimizer.optimizer != "adam":
            raise ConfigError(f"sac learns with adam, not {self.optimizer.optimizer}")
        check_no_kl(self.optimizer, "sac")
        if not 0 <= self.discount <= 1 or not 0 < self.target_tau <= 1:
            raise ConfigError("discount must be in [0, 1], and target_tau above 0 and at most 1")
        if self.initial_temperature <= 0 or (self.temperature or 0.0) < 0:
            raise ConfigError("initial_temperature must be positive, and temperature not negative")
        if self.temperature is not None and self.target_entropy is not None:
            raise ConfigError(
                "temperature is fixed, and target_entropy would fit it: leave one of them out"
            )


class Sac(Algorithm):
    """Acts by sampling the policy; learns soft Q, and the policy that makes most of it."""

    config_type = SacConfig
    heads = "actor_critics"
    averages_gradients = True
    compiles_whole = True
    has_two_sides = True
    shown = ShownMetrics(
        panel=(
            ("critics' loss", "loss/critic"),
            ("TD error", "loss/td_error_mean"),
            ("value", "value_mean"),
            ("entropy, nats", "loss/entropy"),
            ("temperature", "temperature"),
        ),
        line=("TD error", "loss/td_error_mean"),
    )
    model: ActorCriticsNet

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
            precision: Of the products between hidden layers, in updates; see `ActorCriticsNet`.

        Raises:
            ConfigError: actions are not continuous, or the model has no critics.
        """
        model, self._policy = sides_of("sac", model, spec)
        model.set_products(precision)
        super().__init__(
            model,
            experience_of(config, steps=config.n_steps, updates_per_call=config.updates_per_call),
        )
        self.target_critics = frozen(copy.deepcopy(model.critics))
        self._config = config
        self._device = next(model.parameters()).device
        self._updates = 0
        self._generator = torch.Generator(self._device)
        self._generator.manual_seed(0)
        self._put(self._device, self._device, order=config.update_order)

    @property
    def learners(self) -> Learners:
        """Who learns together: only without graphs, and with both sides in one thread."""
        return self._critics.optimizer.learners

    @learners.setter
    def learners(self, learners: Learners) -> None:
        for side in (self._critics, self._actor):
            side.optimizer.learners = learners
        self._actor.alpha_optimizer.learners = learners

    def draw_apart(self, seed: int) -> None:
        """Draws its noise by this seed."""
        self._generator.manual_seed(seed)

    @classmethod
    def worth_compiling(cls, config: SacConfig, agent_steps: int) -> bool:
        """Whether a run of so many steps takes so many updates that compiling pays."""
        per_step = config.replay.samples_per_insert / config.batch_unrolls
        return not per_step or per_step * agent_steps >= _WORTH_COMPILING

    def compile(self, capture: Capture | None = None, *, graphs: bool = True) -> None:
        """Makes an update one graph; with `capture`, replays all of a call as it was recorded.

        A call is recorded only where all of it runs on the device that batches come to. Without
        `graphs` an update is again what it was before.
        """
        self._order = self._eager_order()
        if graphs:
            is_here = self._actor.device == self._critics.device == self._device
            self._order.compile(capture if is_here else None)

    def place(self, actor: torch.device, critics: torch.device) -> None:
        """Moves the two sides to two devices, or, if they are the same, to two threads of it.

        Before anything was learned or compiled.

        Raises:
            ConfigError: the critics are to learn first.
        """
        if self._config.update_order == "sequential":
            raise ConfigError(
                "--update-order sequential has the actor wait for the critics, and two devices "
                "are for learning at the same time: leave it out, or --actor-device and "
                "--critic-device"
            )
        self.model.actor.to(actor)
        self.model.critics.to(critics)
        self.target_critics.to(critics)
        self._put(actor, critics, order="simultaneous")

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
        return self._actor.alpha

    def transition(self, batch: Batch) -> Transition:
        """Makes transitions of a batch, as the networks see them."""
        return seen_by(self.model, batch, self._config)

    def draw(self, batch: int) -> Draws:
        """Draws what updates of `batch` transitions in all need."""
        components = self._policy.encoded_size

        def noise() -> Tensor:
            return torch.randn(batch, components, device=self._device, generator=self._generator)

        def masks() -> tuple[Tensor, ...]:
            return self.model.critics.dropout_masks(batch, self._generator)

        return Draws(noise(), noise(), masks(), masks(), masks())

    def update(self, batch: Batch, *, progress: float) -> Update:
        """Takes the steps of one call with critics, actor and temperature, and moves the targets.

        Metrics are those of the last.
        """
        learning_rate = learning_rate_at(self._config.optimizer, progress)
        transition = self.transition(batch)
        draws = self.draw(len(transition.reward))
        results = self._learn(batch, transition, draws, learning_rate)
        self._copy_statistics()
        # Last: the losses saw by the statistics of before.
        self.model.observe(batch.inputs.observation[:1, :, -1])
        critics, actor = results[-1]
        said = {
            "loss/critic": critics.loss,
            "loss/actor": actor.loss,
            "loss/entropy": -actor.log_prob_mean,
            "loss/td_error_mean": critics.td_error.mean(),
            "temperature": actor.alpha,
            "value_mean": critics.q_mean,
            "target_mean": critics.target_mean,
            "truncated_skipped": (~transition.known).sum().float(),
            "gradient_norm": critics.norm,
            "gradient_norm_actor": actor.norm,
        }
        # Copies: what was recorded writes to the same tensors at the next call.
        metrics = dict(zip(said, torch._foreach_add(list(said.values()), 0.0), strict=True))
        metrics["learning_rate"] = torch.tensor(learning_rate)
        finite = self._all_finite(results)
        priority_B = None
        if self._config.replay.priority_exponent:
            td_error_B = torch.cat([one.critics.td_error for one in results]).to(self._device)
            priority_B = td_error_B * transition.known + LEAST_PRIORITY
        return Update(metrics, finite, priority_B)

    def warm_up(self, batch: Batch) -> None:
        """Learns once, which compiles and captures, and takes everything back; draws nothing."""
        before, drawn = self._updates, self._generator.get_state()
        state = self._tensors()
        kept = [tensor.clone() for tensor in state]
        transition = self.transition(batch)
        try:
            self._learn(batch, transition, self.draw(len(transition.reward)), 0.0)
        finally:  # what cannot be compiled is perhaps done without
            torch._foreach_copy_(state, kept)
            self._updates = before
            self._generator.set_state(drawn)

    def state_dict(self) -> dict[str, Any]:
        """Returns moments, target critics, temperature and the state of the draws."""
        return {
            "updates": self._updates,
            "critic_optimizer": self._critics.optimizer.state_dict(),
            "actor_optimizer": self._actor.optimizer.state_dict(),
            "alpha_optimizer": self._actor.alpha_optimizer.state_dict(),
            "target": dict(self.target_critics.state_dict()),
            "log_alpha": self._actor.log_alpha.detach(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave; on another kind of device, all but the draws."""
        self._updates = state["updates"]
        self._critics.optimizer.load_state_dict(state["critic_optimizer"])
        self._actor.optimizer.load_state_dict(state["actor_optimizer"])
        self._actor.alpha_optimizer.load_state_dict(state["alpha_optimizer"])
        self.target_critics.load_state_dict(state["target"])
        with torch.no_grad():
            self._actor.log_alpha.copy_(state["log_alpha"])
        drawn = state["generator"].cpu()
        if len(drawn) == len(self._generator.get_state()):  # else of another kind of device
            self._generator.set_state(drawn)

    def _put(self, actor: torch.device, critics: torch.device, *, order: str) -> None:
        """Makes the two sides where their networks lie."""
        config, wanted = self._config, self._config.target_entropy
        start = torch.tensor(math.log(config.initial_temperature), device=actor)
        self._actor = ActorSide(
            self.model.actor,
            nn.Parameter(start),
            config.optimizer,
            policy=self._policy,
            target_entropy=-float(self._policy.encoded_size) if wanted is None else wanted,
            temperature=config.temperature,
        )
        self._critics = CriticSide(
            self.model.critics, self.target_critics, config.optimizer, tau=config.target_tau
        )
        self._kind = Simultaneous if order == "simultaneous" else Sequential
        self._order = self._eager_order()

    def _eager_order(self) -> Order:
        return self._kind(self._actor, self._critics)

    def _learn(
        self, batch: Batch, transition: Transition, draws: Draws, learning_rate: float
    ) -> list[Learned]:
        number, count = self._updates, self._config.updates_per_call
        scales = [
            self._critics.optimizer.scales(number + index, learning_rate)
            for index in range(1, count + 1)
        ]
        self._updates += count
        scale = torch.tensor(scales)
        if self._device.type == "cuda":
            scale = scale.pin_memory().to(self._device, non_blocking=True)
        with torch.no_grad():
            inputs = Inputs(transition, draws, _weights(batch, transition), scale)
            return self._order.run(inputs, count, self.beside)

    def _all_finite(self, results: list[Learned]) -> Tensor:
        sides = [side for one in results for side in one]
        said = [torch.stack((side.loss, side.norm)).to(self._device) for side in sides]
        return torch.cat(said).isfinite().all()

    def _tensors(self) -> list[Tensor]:
        """All that an update changes."""
        optimizers = (
            self._critics.optimizer,
            self._actor.optimizer,
            self._actor.alpha_optimizer,
        )
        parts = [part for one in optimizers for part in (one.params, one.first, one.second)]
        tensors = [tensor for part in parts for tensor in part.values()]
        return [tensor.detach() for tensor in (*tensors, *self._critics.target_params.values())]

    def _copy_statistics(self) -> None:
        pairs = zip(self.target_critics.buffers(), self.model.critics.buffers(), strict=True)
        for kept, now in pairs:
            kept.copy_(now)


def _weights(batch: Batch, transition: Transition) -> Tensor:
    """How much each transition counts [B]: those without a known end, nothing."""
    known_B = transition.known.float()
    return known_B if batch.weight is None else batch.weight * known_B
