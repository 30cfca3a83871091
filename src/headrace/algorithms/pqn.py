"""PQN: Q-learning from unrolls as they come, without replay and without target network.

Source: Gallici et al. 2024, "Simplifying Deep Temporal Difference Learning", arXiv:2407.04811,
algorithm 1: Q(lambda) returns of the greedy policy by the network itself, and several passes over a
batch in minibatches; layer norm in the network (`--layer-norm`) keeps that stable. A clock that
cuts an episode is not its end: the value of its last observation goes into the return.

Returns take the network that acts for the one that learns: run it in turns.

Shape suffixes: T = unroll steps, U = T + 1 (the last row only bootstraps), B = unrolls, A =
actions, C = T B samples, M = those of a minibatch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from headrace.algorithms.acting import act_by_values, one_choice
from headrace.algorithms.base import VALUES_METRICS, Algorithm, ExperienceSpec, Model
from headrace.algorithms.exploration import AnnealedEpsilon
from headrace.algorithms.minibatches import (
    Step,
    check_minibatches,
    inputs_mapped,
    load_generator,
    shuffled,
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
from headrace.algorithms.sequences import chosen
from headrace.errors import ConfigError
from headrace.networks.modes import in_eval_mode
from headrace.networks.normalizer import Observer
from headrace.ops.gae import gae_targets
from headrace.ops.rewards import RewardTransform
from headrace.records import Batch, PolicyInput, PolicyStep, Update
from headrace.specs import EnvSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class PqnConfig:
    """The learning rule's settings."""

    unroll_steps: int = 32
    """Makes unrolls of so many agent steps (T)."""
    batch_unrolls: int = 128
    """Makes an update of so many unrolls (B): of all environments, as published."""
    epochs: int = 2
    """Takes so many passes over each batch."""
    minibatches: int = 32
    """Takes so many gradient steps per pass, each on an equal share of the samples."""
    discount: float = 0.99
    """Multiplies rewards one agent step later by this (gamma)."""
    q_lambda: float = 0.65
    """Sets the decay of returns over more steps: 0 trusts values, 1 rewards."""
    initial_epsilon: float = 1.0
    """Takes this share of random actions at the start."""
    final_epsilon: float = 0.001
    """Takes this share of random actions in the end; the share falls to it in a straight line."""
    epsilon_decay: float = 0.1
    """Lets the share of random actions fall in this share of the run, its first part."""
    reward_transform: RewardTransform = "none"
    """Changes rewards before learning: none, clip (to [-1, 1]), soft_asymmetric (the DMLab-30
    code of the IMPALA authors), or normalize (by the deviation of the discounted return)."""
    reward_scale: float = 1.0
    """Multiplies raw rewards, before `reward_transform`: a clip bites on what it makes."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            optimizer="radam", learning_rate=2.5e-4, optimizer_eps=1e-8, max_gradient_norm=10.0
        )
    )
    """How gradients become steps."""

    def __post_init__(self) -> None:
        shares = (self.discount, self.q_lambda, self.initial_epsilon, self.final_epsilon)
        if not all(0 <= share <= 1 for share in shares) or not 0 < self.epsilon_decay <= 1:
            raise ConfigError(
                "discount, q_lambda and epsilons must be in [0, 1], and epsilon_decay in (0, 1]"
            )
        if self.epochs < 1 or self.minibatches < 1:
            raise ConfigError("epochs and minibatches must be at least 1")
        if self.optimizer.learning_rate_schedule == "kl":
            raise ConfigError("pqn has no policy for kl: say --learning-rate-schedule linear")


class Samples(NamedTuple):
    """What gradients are taken of; dimension 1 is what minibatches are drawn from."""

    inputs: PolicyInput  # [1, C, ...]
    action: Tensor  # [1, C]
    target: Tensor  # [1, C] in the unit of transformed rewards

    def columns(self, index_M: Tensor) -> Samples:
        """Returns some of them."""
        inputs = inputs_mapped(self.inputs, lambda x: x.index_select(1, index_M))
        return Samples(inputs, self.action[:, index_M], self.target[:, index_M])


class Pqn(Algorithm):
    """Acts epsilon-greedily; learns Q(lambda) returns of each batch."""

    config_type = PqnConfig
    heads = "action_value"
    on_policy = True
    averages_gradients = True
    shown = VALUES_METRICS

    def __init__(
        self, model: nn.Module, config: PqnConfig, *, spec: EnvSpec, precision: torch.dtype
    ) -> None:
        """Takes the network that learns; `precision` is of its torso's arithmetic in updates.

        Raises:
            ConfigError: actions, network or minibatches do not fit.
        """
        self._actions = one_choice("pqn", spec)
        if cast(Any, model).initial_state(1):
            raise ConfigError(
                "pqn learns from single steps, and this network has a recurrent state: say "
                "--lstm-size 0, or --algorithm r2d2"
            )
        steps, unrolls, passes = config.unroll_steps, config.batch_unrolls, config.epochs
        what = "unroll_steps x batch_unrolls"
        check_minibatches(config.minibatches, what, steps * unrolls, least=1)
        experience = ExperienceSpec(unroll_steps=steps, batch_unrolls=unrolls, passes=passes)
        super().__init__(model, experience)
        self._config, self._precision = config, precision
        self._device = next(model.parameters()).device
        self._epsilon = AnnealedEpsilon(
            model, "linear", initial=config.initial_epsilon, decay=config.epsilon_decay
        )
        self._rewards = RewardRule(
            config.reward_transform,
            scale=config.reward_scale,
            discount=config.discount,
            batch_unrolls=unrolls,
            device=self._device,
        )
        self._optimizer = make_optimizer(
            model.parameters(), config.optimizer, hidden=hidden_weights(model)
        )
        self._generator = torch.Generator(self._device)
        self.draw_apart(0)

    def draw_apart(self, seed: int) -> None:
        """Shuffles by this seed."""
        self._generator.manual_seed(seed)

    def exploration(self, num_envs: int) -> Tensor:
        """Epsilon of each environment in the end: the same for all."""
        return torch.full((num_envs,), self._config.final_epsilon)

    def annealed(self, model: Any, epsilon: Tensor) -> Tensor:
        """Epsilon [N] of environments now."""
        return self._epsilon.at(model, epsilon)

    def act(
        self, model: Model, inputs: PolicyInput, recurrent: tuple[Tensor, ...], **how: Any
    ) -> tuple[PolicyStep, tuple[Tensor, ...]]:
        """Acts epsilon-greedily; see `act_by_values`."""
        return act_by_values(model, inputs, recurrent, **how)

    @torch.no_grad()
    def samples(self, batch: Batch) -> Samples:
        """Returns what gradients are taken of; returns are fixed for all passes."""
        with in_eval_mode(self.model):
            value_UBA = self._values(batch.inputs)
        best_UB = self._actions.masked(value_UBA, batch.inputs.action_mask).amax(dim=-1)
        reward_TB, discount_TB = self._rewards(batch)
        targets = gae_targets(reward_TB, discount_TB, best_UB, lambda_=self._config.q_lambda)
        inputs = inputs_mapped(batch.inputs, lambda x: x[:-1].flatten(0, 1).unsqueeze(0))
        return Samples(inputs, batch.action.view(1, -1), targets.value_TB.view(1, -1))

    def loss(self, samples: Samples) -> Step:
        """Returns half the mean squared error of a minibatch, and its parts, detached."""
        value_1M = chosen(self._values(samples.inputs), samples.action)
        error_1M = value_1M - samples.target
        total = 0.5 * error_1M.square().mean()
        return total, {
            "loss/total": total.detach(),
            "loss/td_error_mean": error_1M.detach().abs().mean(),
            "value_mean": value_1M.detach().mean(),
            "target_mean": samples.target.mean(),
        }

    def update(self, batch: Batch, *, progress: float) -> Update:
        """Takes all gradient steps on a batch; metrics are means over them."""
        config, self._rewards.learners = self._config, self.learners
        self._rewards.observe(batch)
        samples = self.samples(batch)

        def losses_of_a_pass() -> Iterator[Step]:
            for index_M in shuffled(self._generator, batch.action.numel(), config.minibatches):
                yield self.loss(samples.columns(index_M))

        update = take_steps(
            (losses_of_a_pass() for _ in range(config.epochs)),
            self._optimizer,
            StepSize(config.optimizer),
            progress=progress,
            max_norm=config.optimizer.max_gradient_norm,
            stop_kl=0.0,
            learners=self.learners,
        )
        # Last: the network that acted saw by the statistics that the passes have just seen by.
        if isinstance(self.model, Observer):
            self.model.observe(batch.inputs.observation[:-1, :, -1])
        self._epsilon.advance(progress)
        return update

    def warm_up(self, batch: Batch) -> None:
        """Runs returns, and one minibatch's loss and gradient, and forgets them."""
        samples = self.samples(batch)
        index_C = torch.arange(samples.action.shape[1], device=self._device)
        index_M = index_C[: len(index_C) // self._config.minibatches]
        torch.autograd.backward(self.loss(samples.columns(index_M))[0])
        self._optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Returns the optimiser, the shuffles, the spread of returns, and what is explored."""
        return {
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
            "rewards": self._rewards.state_dict(),
            "exploration_left": self._epsilon.left,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        load_optimizer(self._optimizer, state["optimizer"])
        load_generator(self._generator, state["generator"])
        self._rewards.load_state_dict(state["rewards"])
        self._epsilon.load(state["exploration_left"])

    def _values(self, inputs: PolicyInput) -> Tensor:
        low = self._precision != torch.float32
        with torch.autocast(self._device.type, self._precision, enabled=low):
            return self.model(inputs, ())[0].value  # type: ignore[no-any-return]
