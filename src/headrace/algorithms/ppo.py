"""PPO: several passes over a batch, each step held close to the policy that acted.

Source: Schulman et al. 2017, "Proximal policy optimization algorithms", arXiv:1707.06347; details
as in Huang et al. 2022, "The 37 implementation details of proximal policy optimization".

Advantages assume that the policy that acted is the one that learns: run it in turns.

Of several learners each shuffles its own columns, so that a minibatch has as many of every learner;
that apart they take the steps that one learner with the whole batch would take. Advantages are
normalised over the minibatch of all.

Shape suffixes: T = unroll steps, U = T + 1 (the last row only bootstraps), B = unrolls. A sample is
[R, C]: one row of a column where the network has no recurrent state (R = 1, C = T B), else a whole
unroll (R = T, C = B); M of the C columns are a minibatch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headrace.algorithms.acting import act_by_policy
from headrace.algorithms.base import (
    POLICY_METRICS,
    ActionMode,
    Algorithm,
    ExperienceSpec,
    Learners,
    Model,
)
from headrace.algorithms.minibatches import (
    Step,
    check_end,
    check_kl,
    check_minibatches,
    inputs_mapped,
    load_generator,
    shuffled,
    standardized,
    take_steps,
)
from headrace.algorithms.optimizers import (
    OptimizerConfig,
    StepSize,
    hidden_weights,
    load_optimizer,
    make_optimizer,
)
from headrace.algorithms.rewards import RewardRule
from headrace.errors import ConfigError
from headrace.networks.heads import in_units, popart_head, popart_metrics
from headrace.networks.modes import in_eval_mode
from headrace.networks.normalizer import Observer
from headrace.ops import losses
from headrace.ops.distributions import make_distribution
from headrace.ops.gae import gae_targets
from headrace.ops.rewards import RewardTransform
from headrace.records import Batch, PolicyInput, PolicyStep, Update
from headrace.schedules import Schedule, between, remaining
from headrace.specs import EnvSpec


def _default_optimizer() -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam", learning_rate=2.5e-4, optimizer_eps=1e-5, max_gradient_norm=0.5
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PpoConfig:
    """The learning rule's settings."""

    unroll_steps: int = 128
    """Makes unrolls of so many agent steps (T)."""
    batch_unrolls: int = 8
    """Makes an update of so many unrolls (B); as many as there are environments, for the published
    algorithm."""
    epochs: int = 4
    """Makes so many passes over a batch."""
    minibatches: int = 4
    """Takes so many gradient steps per pass, each on an equal share of the samples, or of the
    unrolls where the network is recurrent."""
    discount: float = 0.99
    """Multiplies rewards one agent step later by this (gamma)."""
    gae_lambda: float = 0.95
    """Sets the decay of the advantage over more steps: 0 trusts values, 1 rewards."""
    clip_range: float = 0.2
    """Stops the gradient where the ratio of probabilities has left 1 by this much."""
    clip_range_schedule: Schedule = "constant"
    """Moves clip_range to zero at the end of the run (linear, cosine), or leaves it (constant)."""
    stop_kl: float = 0.0
    """Makes no further pass over a batch once the policy has moved by more than so many nats, as
    the first minibatch of that pass says; 0 never stops."""
    value_clip_range: float = 0.0
    """Stops the gradient where a value has moved by this much in an update, in units of returns or,
    where values are normalised, of their spread; 0 allows any distance."""
    normalize_advantage: bool = True
    """Brings the advantages of a minibatch to mean 0 and deviation 1."""
    entropy_cost: float = 0.01
    """Weighs the entropy bonus in the loss."""
    entropy_cost_schedule: Schedule = "constant"
    """Moves entropy_cost to final_entropy_cost at the end of the run (linear, cosine), or leaves it
    (constant)."""
    final_entropy_cost: float = 0.0
    """Says where entropy_cost_schedule ends."""
    value_cost: float = 0.5
    """Weighs the value loss, which is half the mean squared error."""
    reward_transform: RewardTransform = "none"
    """Changes rewards before learning: none, clip (to [-1, 1]), soft_asymmetric (the DMLab-30 code
    of the IMPALA authors), or normalize (by the running deviation of the discounted return)."""
    reward_scale: float = 1.0
    """Multiplies raw rewards, before `reward_transform`: a clip bites on what it makes."""
    optimizer: OptimizerConfig = field(default_factory=_default_optimizer)
    """How gradients become steps."""

    def __post_init__(self) -> None:
        if not 0 <= self.discount <= 1 or not 0 <= self.gae_lambda <= 1:
            raise ConfigError("discount and gae_lambda must be in [0, 1]")
        if self.epochs < 1 or self.minibatches < 1:
            raise ConfigError("epochs and minibatches must be at least 1")
        if not 0 < self.clip_range < math.inf:
            raise ConfigError(
                f"clip_range must be positive and finite, not {self.clip_range}: say "
                "--clip-range 0.2"
            )
        if self.value_clip_range < 0 or self.entropy_cost < 0:
            raise ConfigError("value_clip_range and entropy_cost must not be negative")
        check_end("entropy_cost", self.final_entropy_cost, self.entropy_cost_schedule)
        check_kl(self.optimizer, stop_kl=self.stop_kl, passes=self.epochs, flag="--epochs")


class Samples(NamedTuple):
    """What gradients are taken of; dimension 1 is what minibatches are drawn from."""

    inputs: PolicyInput  # [R, C, ...]
    recurrent: tuple[Tensor, ...]  # each [C, ...] state fed to row 0; empty without one
    action: Tensor  # [R, C, ...]
    log_prob: Tensor  # [R, C] of the policy that acted
    advantage: Tensor  # [R, C]
    target: Tensor  # [R, C] of the value
    value: Tensor  # [R, C] before the update


class Ppo(Algorithm):
    """Acts by sampling the policy; learns by the clipped surrogate objective."""

    config_type = PpoConfig
    on_policy = True
    normalizes_values = True
    averages_gradients = True
    shown = POLICY_METRICS

    def __init__(
        self,
        model: nn.Module,
        config: PpoConfig,
        *,
        spec: EnvSpec,
        precision: torch.dtype = torch.float32,
    ) -> None:
        """Takes the network that learns.

        Args:
            model: `networks.models.PolicyValueNet`, or anything that is called alike.
            config: The learning rule's settings.
            spec: Of the environment: its actions say what kind of policy the model's output is.
            precision: dtype of the torso's arithmetic in updates; weights stay float32.

        Raises:
            ConfigError: minibatches of equal size cannot be made.
        """
        experience = ExperienceSpec(
            unroll_steps=config.unroll_steps,
            batch_unrolls=config.batch_unrolls,
            passes=config.epochs,
        )
        super().__init__(model, experience)
        self._config = config
        self._precision = precision
        device = next(model.parameters()).device
        self._device_type = device.type
        self._distribution = make_distribution(spec.action_space)
        self._rewards = RewardRule(
            config.reward_transform,
            scale=config.reward_scale,
            discount=config.discount,
            batch_unrolls=config.batch_unrolls,
            device=device,
        )
        stateful: Any = model
        self._is_recurrent = bool(stateful.initial_state(1))
        self._columns = config.batch_unrolls
        if not self._is_recurrent:
            self._columns *= config.unroll_steps
        what = "batch_unrolls" if self._is_recurrent else "unroll_steps x batch_unrolls"
        check_minibatches(config.minibatches, what, self._columns, least=2)
        self._optimizer = make_optimizer(
            model.parameters(), config.optimizer, hidden=hidden_weights(model)
        )
        self._step_size = StepSize(config.optimizer)
        self._popart = popart_head(model)
        self._generator = torch.Generator(device)
        self._generator.manual_seed(0)
        self._entropy_cost = config.entropy_cost

    @property
    def learners(self) -> Learners:
        """Who learns together."""
        return self._rewards.learners

    @learners.setter
    def learners(self, learners: Learners) -> None:
        self._rewards.learners = learners

    def draw_apart(self, seed: int) -> None:
        """Shuffles by this seed."""
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
        """Acts by the policy; see `act_by_policy`."""
        return act_by_policy(
            self._distribution,
            model,
            inputs,
            recurrent,
            mode=mode,
            generator=generator,
            epsilon=epsilon,
        )

    @torch.no_grad()
    def samples(self, batch: Batch) -> Samples:
        """Returns what gradients are taken of: advantages and targets are fixed for all passes.

        Values are those of the weights that learn, in eval mode. Unrolls store none; in turns they
        would be the same, and where the policy that acted is older, these are the better estimates.
        """
        with in_eval_mode(self.model):
            output, _ = self._forward(batch.inputs, batch.recurrent)
        reward_TB, discount_TB = self._rewards(batch)
        targets = gae_targets(reward_TB, discount_TB, output.value, lambda_=self._config.gae_lambda)
        samples = Samples(
            inputs=inputs_mapped(batch.inputs, lambda x: x[:-1]),
            recurrent=batch.recurrent,
            action=batch.action,
            log_prob=batch.log_prob,
            advantage=targets.advantage_TB,
            target=targets.value_TB,
            value=output.value[:-1],
        )
        if self._is_recurrent:
            return samples
        return _mapped(samples, lambda x: x.flatten(0, 1).unsqueeze(0))

    def loss(self, samples: Samples, *, clip_range: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of a minibatch [R, M] and its parts, detached."""
        config = self._config
        output, _ = self._forward(samples.inputs, samples.recurrent)
        parameters = self._distribution.masked(output.parameters, samples.inputs.action_mask)
        log_ratio = self._distribution.log_prob(parameters, samples.action) - samples.log_prob
        advantage, value, target, old_value = in_units(
            self._popart, samples.advantage, output.value, samples.target, samples.value
        )
        if config.normalize_advantage:
            advantage = standardized(advantage, self.learners)
        policy_loss = losses.clipped_surrogate_loss(log_ratio, advantage, clip_range)
        if config.value_clip_range:
            value_loss = losses.clipped_value_loss(
                value, target, old_value, config.value_clip_range
            )
        else:
            value_loss = losses.value_loss(value, target)
        entropy = self._distribution.entropy(parameters).mean()
        total = policy_loss + config.value_cost * value_loss - self._entropy_cost * entropy
        ratio = losses.ratio_of(log_ratio.detach())
        return total, {
            "loss/total": total.detach(),
            "loss/policy": policy_loss.detach(),
            "loss/value": value_loss.detach(),
            "loss/entropy": entropy.detach(),
            "entropy_cost": torch.tensor(self._entropy_cost),
            "clip_range": torch.tensor(clip_range),
            "value_mean": output.value.detach().mean(),
            "importance_ratio_mean": ratio.mean(),
            "kl_divergence": losses.divergence(log_ratio.detach()),
            "clipped_share": ((ratio - 1.0).abs() > clip_range).float().mean(),
            **popart_metrics(self._popart),
        }

    def update(self, batch: Batch, *, progress: float) -> Update:
        """Takes all gradient steps on a batch; metrics are means over them."""
        config = self._config
        clip_range = config.clip_range * remaining(config.clip_range_schedule, progress)
        self._entropy_cost = between(
            config.entropy_cost, config.final_entropy_cost, config.entropy_cost_schedule, progress
        )
        self._rewards.observe(batch)
        samples = self.samples(batch)
        if self._popart is not None:
            self._popart.observe_targets(samples.target)

        def losses_of_a_pass() -> Iterator[Step]:
            for index_M in shuffled(self._generator, self._columns, config.minibatches):
                yield self.loss(self._chosen(samples, index_M), clip_range=clip_range)

        update = take_steps(
            (losses_of_a_pass() for _ in range(config.epochs)),
            self._optimizer,
            self._step_size,
            progress=progress,
            max_norm=config.optimizer.max_gradient_norm,
            stop_kl=config.stop_kl,
            learners=self.learners,
        )
        # Last: the policy that acted saw by the statistics that the passes have just seen by; new
        # ones would move every ratio away from 1 before the first step.
        if isinstance(self.model, Observer):
            self.model.observe(batch.inputs.observation[:-1, :, -1])
        return update

    def warm_up(self, batch: Batch) -> None:
        """Runs values, and one minibatch's loss and gradient, and forgets them."""
        samples = self.samples(batch)
        index_M = torch.arange(
            self._columns // self._config.minibatches, device=samples.value.device
        )
        total, _ = self.loss(self._chosen(samples, index_M), clip_range=self._config.clip_range)
        torch.autograd.backward(total)
        self._optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Returns the optimiser with its step size, the shuffles and the deviation of returns."""
        return {
            "optimizer": self._optimizer.state_dict(),
            "step_size": self._step_size.state_dict() if self._step_size.follows_kl else None,
            "generator": self._generator.get_state(),
            "rewards": self._rewards.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        load_optimizer(self._optimizer, state["optimizer"])
        self._step_size.load_state_dict(state.get("step_size") or {})
        load_generator(self._generator, state["generator"])
        self._rewards.load_state_dict(state["rewards"])

    def _forward(self, inputs: PolicyInput, recurrent: tuple[Tensor, ...]) -> Any:
        with torch.autocast(
            self._device_type, self._precision, enabled=self._precision != torch.float32
        ):
            return self.model(inputs, recurrent)

    def _chosen(self, samples: Samples, index_M: Tensor) -> Samples:
        chosen = _mapped(samples, lambda x: x.index_select(1, index_M))
        return chosen._replace(
            recurrent=tuple(part.index_select(0, index_M) for part in samples.recurrent)
        )


def _mapped(samples: Samples, change: Callable[[Tensor], Tensor]) -> Samples:
    """Applies `change` to all that is [R, C, ...]."""
    return Samples(
        inputs=inputs_mapped(samples.inputs, change),
        recurrent=samples.recurrent,
        action=change(samples.action),
        log_prob=change(samples.log_prob),
        advantage=change(samples.advantage),
        target=change(samples.target),
        value=change(samples.value),
    )
