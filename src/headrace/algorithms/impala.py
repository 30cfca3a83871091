"""IMPALA: an actor-critic whose targets are corrected for the lag of the policy that acted.

Source: Espeholt et al. 2018, "IMPALA: Scalable Distributed Deep-RL with Importance Weighted
Actor-Learner Architectures", arXiv:1802.01561, sections 3 and 4. Losses are means over T and B (the
paper's are sums; the presets convert its settings). The adaptive entropy cost is that of SEED RL,
Espeholt et al. 2020.

With several passes over a batch the policy loss is PPO's clipped surrogate, on V-trace's
advantages, of the ratio to the policy at the batch's first pass, as in Luo et al. 2019, "IMPACT:
Importance Weighted Asynchronous Architectures with Clipped Target Networks", arXiv:1912.00167,
section 3, with that policy as the target network. V-trace's own ratios are against the policy that
acted; targets are made anew at the start of each pass. But the weight of an advantage keeps the
ratio of the first: the surrogate has what came since.

Shape suffixes: T = unroll steps, U = T + 1 (the last row only bootstraps), B = unrolls, M = those
of a minibatch, P = parameters of the policy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
    columns_of,
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
from headrace.ops.rewards import RewardTransform
from headrace.ops.vtrace import LambdaForm, VTraceTargets, vtrace_targets
from headrace.records import Batch, PolicyInput, PolicyStep, Update
from headrace.schedules import Schedule, between, remaining
from headrace.specs import EnvSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ImpalaConfig:
    """The learning rule's settings."""

    unroll_steps: int = 20
    """Makes unrolls of so many agent steps (T)."""
    batch_unrolls: int = 32
    """Makes an update of so many unrolls (B), which learns from T x B samples."""
    passes: int = 1
    """Learns from each batch so many times, 1 to 4, while the server goes on."""
    minibatches: int = 1
    """Takes so many gradient steps per pass, each on an equal share of the unrolls."""
    clip_range: float = 0.0
    """Stops the gradient where the ratio to the policy at a batch's first pass has left 1 by this
    much, if that policy changes within a batch; 0 allows any distance."""
    clip_range_schedule: Schedule = "constant"
    """Moves clip_range to zero at the end of the run (linear, cosine), or leaves it (constant)."""
    stop_kl: float = 0.0
    """Makes no further pass over a batch once the policy has moved by more than so many nats, as
    the first minibatch of that pass says; 0 never stops."""
    discount: float = 0.99
    """Multiplies rewards one agent step later by this (gamma)."""
    normalize_advantage: bool = False
    """Brings the advantages of a minibatch to mean 0 and deviation 1."""
    entropy_cost: float = 0.01
    """Weighs the entropy bonus in the loss; with target_entropy, the adaptive weight starts
    here."""
    entropy_cost_schedule: Schedule = "constant"
    """Moves entropy_cost to final_entropy_cost at the end of the run (linear, cosine), or leaves it
    (constant)."""
    final_entropy_cost: float = 0.0
    """Says where entropy_cost_schedule ends."""
    target_entropy: float | None = None
    """Moves the weight of the entropy bonus so that the policy's mean entropy comes to so many
    nats; None leaves the weight fixed."""
    entropy_cost_adjustment_speed: float = 10.0
    """Says how fast target_entropy moves that weight: k in alpha = exp(k p)."""
    value_cost: float = 0.5
    """Weighs the value loss, which is half the mean squared error."""
    reward_transform: RewardTransform = "none"
    """Changes rewards before learning: none, clip (to [-1, 1]), soft_asymmetric (the DMLab-30 code
    of the IMPALA authors), or normalize (by the running deviation of the discounted return)."""
    reward_scale: float = 1.0
    """Multiplies raw rewards, before `reward_transform`: a clip bites on what it makes."""
    vtrace_lambda: float = 1.0
    """Sets the decay of the traces: 1 is the paper's, less trades variance for bias."""
    vtrace_lambda_form: LambdaForm = "traces"
    """Says what vtrace_lambda below 1 weighs: only the traces (the paper), or the bootstrap of the
    advantage too (rlax)."""
    vtrace_rho_max: float = 1.0
    """Clips the ratio in the temporal difference; this sets the fixed point."""
    vtrace_c_max: float = 1.0
    """Clips the ratio in the traces; this sets the speed."""
    vtrace_pg_rho_max: float = 1.0
    """Clips the ratio in the policy gradient."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How gradients become steps."""

    def __post_init__(self) -> None:
        if not 0 <= self.discount <= 1 or not 0 <= self.vtrace_lambda <= 1:
            raise ConfigError("discount and vtrace_lambda must be in [0, 1]")
        if not 1 <= self.passes <= 4:
            nearest = min(4, max(1, self.passes))
            raise ConfigError(f"passes must be 1 to 4, not {self.passes}: say --passes {nearest}")
        if self.minibatches < 1:
            raise ConfigError(
                f"minibatches must be at least 1, not {self.minibatches}: say --minibatches 1"
            )
        if not 0 <= self.clip_range < math.inf:
            raise ConfigError(
                f"clip_range must be 0 (for none) or positive and finite, not {self.clip_range}: "
                "say --clip-range 0"
            )
        if self.clip_range_schedule != "constant" and not self.clip_range:
            raise ConfigError(
                "clip_range_schedule has no effect without a clip: say --clip-range 0.2 --passes 2"
            )
        check_minibatches(self.minibatches, "batch_unrolls", self.batch_unrolls, least=1)
        if self.clip_range and self.passes == self.minibatches == 1:
            raise ConfigError(
                "clip_range has no effect on one gradient step a batch: say --clip-range 0, or "
                "--passes 2"
            )
        check_kl(self.optimizer, stop_kl=self.stop_kl, passes=self.passes, flag="--passes")
        if self.vtrace_lambda == 1 and self.vtrace_lambda_form != "traces":
            raise ConfigError(
                "vtrace_lambda_form has no effect on a vtrace_lambda of 1: say --vtrace-lambda "
                "0.95 as well"
            )
        if self.entropy_cost < 0 or (self.target_entropy is not None and self.entropy_cost == 0):
            raise ConfigError(
                "entropy_cost must be positive where target_entropy is set, else >= 0"
            )
        check_end("entropy_cost", self.final_entropy_cost, self.entropy_cost_schedule)
        if self.target_entropy is not None and self.entropy_cost_schedule != "constant":
            raise ConfigError(
                "target_entropy adapts the entropy cost, which entropy_cost_schedule cannot set "
                "as well: say --entropy-cost-schedule constant"
            )


class _Output(NamedTuple):
    """What the network says of a batch."""

    parameters_TBP: Tensor
    log_prob_TB: Tensor  # of the actions that were taken
    value_UB: Tensor


class Impala(Algorithm):
    """Acts by sampling the policy; learns by V-trace."""

    config_type = ImpalaConfig
    normalizes_values = True
    averages_gradients = True
    shown = POLICY_METRICS

    def __init__(
        self,
        model: nn.Module,
        config: ImpalaConfig,
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
        """
        experience = ExperienceSpec(
            unroll_steps=config.unroll_steps,
            batch_unrolls=config.batch_unrolls,
            passes=config.passes,
        )
        super().__init__(model, experience)
        self._config = config
        self._precision = precision
        first = next(model.parameters())
        self._device_type = first.device.type
        self._distribution = make_distribution(spec.action_space)
        self._rewards = RewardRule(
            config.reward_transform,
            scale=config.reward_scale,
            discount=config.discount,
            batch_unrolls=config.batch_unrolls,
            device=first.device,
        )
        params = list(model.parameters())
        self._log_alpha: Tensor | None = None
        if config.target_entropy is not None:
            start = math.log(config.entropy_cost) / config.entropy_cost_adjustment_speed
            self._log_alpha = nn.Parameter(torch.tensor(start, device=first.device))
            params.append(self._log_alpha)
        self._optimizer = make_optimizer(params, config.optimizer, hidden=hidden_weights(model))
        self._step_size = StepSize(config.optimizer)
        self._popart = popart_head(model)
        self._generator = torch.Generator(first.device)
        self._generator.manual_seed(0)
        self._clip_range, self._entropy_cost = config.clip_range, config.entropy_cost

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

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of a batch's first pass and its parts, detached."""
        output = self._forward(batch)
        return self._loss(batch, output, self._targets(batch, output), None)

    def update(self, batch: Batch, *, progress: float) -> Update:
        """Takes all gradient steps on a batch; metrics are means over them."""
        config = self._config
        self._rewards.observe(batch)
        self._clip_range = config.clip_range * remaining(config.clip_range_schedule, progress)
        self._entropy_cost = between(
            config.entropy_cost, config.final_entropy_cost, config.entropy_cost_schedule, progress
        )
        update = take_steps(
            self._passes(batch),
            self._optimizer,
            self._step_size,
            progress=progress,
            max_norm=config.optimizer.max_gradient_norm,
            stop_kl=config.stop_kl,
            learners=self.learners,
            after=self._bound_alpha,
        )
        # Last: the policy that acted saw by the statistics that the losses have just seen by.
        if isinstance(self.model, Observer):
            self.model.observe(batch.inputs.observation[:-1, :, -1])
        return update

    def warm_up(self, batch: Batch) -> None:
        """Runs one step's loss and its gradient, and forgets them."""
        config = self._config
        if config.minibatches > 1:
            with torch.no_grad(), in_eval_mode(self.model):
                self._forward(batch)
            some = torch.arange(config.batch_unrolls // config.minibatches)
            batch = columns_of(batch, some.to(batch.reward.device))
        total, _ = self.loss(batch)
        torch.autograd.backward(total)
        self._optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Returns the optimiser with its step size, entropy cost, shuffles, spread of returns."""
        shuffles = self._config.minibatches > 1
        return {
            "optimizer": self._optimizer.state_dict(),
            "step_size": self._step_size.state_dict() if self._step_size.follows_kl else None,
            "log_alpha": self._log_alpha,
            "generator": self._generator.get_state() if shuffles else None,
            "rewards": self._rewards.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        load_optimizer(self._optimizer, state["optimizer"])
        self._step_size.load_state_dict(state.get("step_size") or {})
        self._rewards.load_state_dict(state.get("rewards", {}))  # runs of 0.1 have none
        if state.get("generator") is not None:
            load_generator(self._generator, state["generator"])
        if self._log_alpha is not None:
            with torch.no_grad():
                self._log_alpha.copy_(state["log_alpha"])

    def _passes(self, batch: Batch) -> Iterator[Iterator[Step]]:
        """Yields the losses of each pass; each step is taken before the next loss is asked for."""
        first_TB: Tensor | None = None
        for _ in range(self._config.passes):
            moves_values = self._popart is not None and first_TB is None
            if self._config.minibatches == 1 and not moves_values:
                output = self._forward(batch)  # the step differentiates what targets are made of
            else:
                with torch.no_grad(), in_eval_mode(self.model):
                    output = self._forward(batch)
            yield self._losses(batch, output, first_TB)
            if first_TB is None:
                first_TB = output.log_prob_TB.detach()

    def _losses(self, batch: Batch, output: _Output, first_TB: Tensor | None) -> Iterator[Step]:
        """Yields those of one pass; `first_TB` is the log-probability at the first, if earlier."""
        config = self._config
        targets = self._targets(batch, output, first_TB)
        if self._popart is not None and first_TB is None:
            self._popart.observe_targets(targets.value_TB)
            if config.minibatches == 1:
                output = self._forward(batch)  # by the layer as it is now
        if config.minibatches == 1:
            yield self._loss(batch, output, targets, first_TB)
            return
        if first_TB is None:
            first_TB = output.log_prob_TB
        for index_M in shuffled(self._generator, config.batch_unrolls, config.minibatches):
            part = VTraceTargets(*(x.index_select(1, index_M) for x in targets))
            chosen = columns_of(batch, index_M)
            first_TM = first_TB.index_select(1, index_M)
            yield self._loss(chosen, self._forward(chosen), part, first_TM)

    def _forward(self, batch: Batch) -> _Output:
        with torch.autocast(
            self._device_type, self._precision, enabled=self._precision != torch.float32
        ):
            output, _ = self.model(batch.inputs, batch.recurrent)
        mask = batch.inputs.action_mask
        parameters_TBP = self._distribution.masked(
            output.parameters[:-1], None if mask is None else mask[:-1]
        )
        log_prob_TB = self._distribution.log_prob(parameters_TBP, batch.action)
        return _Output(parameters_TBP, log_prob_TB, output.value)

    def _targets(
        self, batch: Batch, output: _Output, first_TB: Tensor | None = None
    ) -> VTraceTargets:
        """Returns V-trace's targets; `first_TB` is the log-probability at the first pass."""
        config = self._config
        reward_TB, discount_TB = self._rewards(batch)
        return vtrace_targets(
            output.log_prob_TB.detach() - batch.log_prob,
            reward_TB,
            discount_TB,
            output.value_UB.detach(),
            rho_max=config.vtrace_rho_max,
            c_max=config.vtrace_c_max,
            pg_rho_max=config.vtrace_pg_rho_max,
            lambda_=config.vtrace_lambda,
            lambda_form=config.vtrace_lambda_form,
            pg_log_ratio_TB=None if first_TB is None else first_TB - batch.log_prob,
        )

    def _loss(
        self, batch: Batch, output: _Output, targets: VTraceTargets, first_TB: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of one step; `first_TB` is the log-probability at the first pass."""
        config = self._config
        advantage_TB, value_TB, target_TB = in_units(
            self._popart, targets.advantage_TB, output.value_UB[:-1], targets.value_TB
        )
        if config.normalize_advantage:
            advantage_TB = standardized(advantage_TB, self.learners)
        more: dict[str, Tensor] = {}
        if first_TB is None:
            policy_loss = losses.policy_gradient_loss(output.log_prob_TB, advantage_TB)
            if config.passes > 1:
                more["kl_divergence"] = torch.zeros_like(policy_loss.detach())
        else:
            clip_range = self._clip_range if config.clip_range else math.inf
            log_ratio_TB = output.log_prob_TB - first_TB
            policy_loss = losses.clipped_surrogate_loss(log_ratio_TB, advantage_TB, clip_range)
            more["kl_divergence"] = losses.divergence(
                log_ratio_TB.detach(), losses.ratio_of(first_TB - batch.log_prob)
            )
        if config.clip_range:
            more["clip_range"] = torch.tensor(self._clip_range)
        value_loss = losses.value_loss(value_TB, target_TB)
        entropy = self._distribution.entropy(output.parameters_TBP).mean()
        entropy_loss, alpha = self._entropy_loss(entropy)
        total = policy_loss + config.value_cost * value_loss + entropy_loss
        return total, {
            "loss/total": total.detach(),
            "loss/policy": policy_loss.detach(),
            "loss/value": value_loss.detach(),
            "loss/entropy": entropy.detach(),
            "entropy_cost": alpha,
            "value_mean": output.value_UB.detach().mean(),
            "importance_ratio_mean": losses.ratio_of(
                output.log_prob_TB.detach() - batch.log_prob
            ).mean(),
            **more,
            **popart_metrics(self._popart),
        }

    def _entropy_loss(self, entropy: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the loss whose gradient raises the entropy, and the weight that it has."""
        config = self._config
        if self._log_alpha is None or config.target_entropy is None:
            return -self._entropy_cost * entropy, torch.tensor(self._entropy_cost)
        alpha = losses.entropy_cost(self._log_alpha, config.entropy_cost_adjustment_speed)
        adjust = losses.entropy_cost_loss(alpha, entropy, config.target_entropy)
        return -alpha.detach() * entropy + adjust, alpha.detach()

    def _bound_alpha(self) -> None:
        if self._log_alpha is not None:
            bound = 20.0 / self._config.entropy_cost_adjustment_speed
            with torch.no_grad():
                self._log_alpha.clamp_(-bound, bound)
