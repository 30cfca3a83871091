"""R2D2: recurrent Q-learning from a replay of sequences. Without an LSTM and burn-in: DQN.

Source: Kapturowski et al. 2019, "Recurrent Experience Replay in Distributed Reinforcement Learning"
(ICLR), sections 2.3 and 3. Losses are means over T and B (the paper's are sums over T; the presets
convert its settings). A clock that cuts an episode is not its end: the value of the final
observation, from the networks of this update, goes into the target.

    rows of a sequence   0 … b - 1    b … b + T - 1      … b + T + n - 1, or b + T
                         burn-in      learned            behind it: full returns, or the last row

Networks speak in the rescaled unit; all that leaves this file, and `PolicyStep`, in that of the
transformed rewards.

Shape suffixes: T = learned steps, R = steps after the burn-in, U = rows, B = sequences, F = final
observations, N = environments, A = actions.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import torch
from torch import Tensor, nn

from headrace.algorithms import sequences
from headrace.algorithms.base import ActionMode, ExperienceSpec, Model, ReplayConfig, ReplaySpec
from headrace.algorithms.optimizers import (
    OptimizerConfig,
    clipped_step,
    learning_rate_at,
    load_optimizer,
    make_optimizer,
)
from headrace.errors import ConfigError
from headrace.networks.normalizer import Observer
from headrace.ops.distributions import Categorical
from headrace.ops.exploration import epsilon_greedy, epsilon_ladder
from headrace.ops.priorities import sequence_priority
from headrace.ops.rewards import transform_reward
from headrace.ops.value_scale import rescale, unrescale
from headrace.records import Batch, PolicyInput, PolicyStep, Update
from headrace.specs import EnvSpec

_LEAST_PRIORITY = 1e-6
"""Added to all priorities: a sequence without an error must not be lost for good."""


def _default_optimizer() -> OptimizerConfig:
    """SEED RL's for Atari: eps 1e-3 and clip 80 of a sum over 80 steps."""
    return OptimizerConfig(
        optimizer="adam",
        learning_rate=1e-4,
        learning_rate_schedule="constant",
        optimizer_eps=1e-3 / 80,
        max_gradient_norm=80.0 / 80,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class R2d2Config:
    """The learning rule's settings."""

    unroll_steps: int = 80
    """T: agent steps of a sequence that are learned from."""
    burn_in_steps: int = 40
    """Steps before them that only warm the recurrent state up."""
    overlap_steps: int | None = None
    """Steps that a sequence shares with the next one of its environment; None: as many as are not
    learned from, so that every step is learned from in one sequence."""
    batch_unrolls: int = 64
    """B: sequences per update."""
    discount: float = 0.997
    """gamma, per agent step."""
    n_steps: int = 5
    """n: rewards in a target, before the value behind them."""
    full_returns: bool = False
    """True: sequences are n_steps - 1 steps longer, which are not learned from, so that the last
    targets need not make do with fewer rewards."""
    rescale_values: bool = True
    """Whether values are learned as h(Q), which tames large returns without clipping rewards."""
    value_scale_epsilon: float = 1e-3
    """The linear part of h."""
    double_q: bool = True
    """Whether the network that learns chooses the action whose value the target network gives (van
    Hasselt et al. 2016, arXiv:1509.06461); else the target network does both."""
    target_update_interval: int = 2500
    """Updates between two copies of the weights into the target network."""
    priority_eta: float = 0.9
    """Share of the largest error in a sequence's priority; the rest is the mean's."""
    epsilon_base: float = 0.4
    """Share of random actions of the environment that explores most."""
    epsilon_power: float = 7.0
    """The last environment has epsilon_base to the power 1 + epsilon_power."""
    eval_epsilon: float = 1e-3
    """Share of random actions of the environments that play beside training."""
    reward_transform: Literal["none", "clip", "soft_asymmetric"] = "none"
    """none, clip (to [-1, 1]), or soft_asymmetric (the DMLab-30 code of the IMPALA authors)."""
    reward_scale: float = 1.0
    """Factor on raw rewards, before `reward_transform`: a clip bites on what it makes."""
    optimizer: OptimizerConfig = field(default_factory=_default_optimizer)
    """How gradients become steps."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    """What is kept, and how it is sampled."""

    def __post_init__(self) -> None:
        counts = (self.unroll_steps, self.batch_unrolls, self.n_steps, self.target_update_interval)
        if min(counts) < 1:
            raise ConfigError(
                "unroll_steps, batch_unrolls, n_steps and target_update_interval must be at least 1"
            )
        if min(self.burn_in_steps, self.value_scale_epsilon, self.epsilon_power) < 0:
            raise ConfigError(
                "burn_in_steps, value_scale_epsilon and epsilon_power must not be negative"
            )
        shares = (self.discount, self.priority_eta, self.epsilon_base, self.eval_epsilon)
        if min(shares) < 0 or max(shares) > 1:
            raise ConfigError(
                "discount, priority_eta, epsilon_base and eval_epsilon must be in [0, 1]"
            )
        if not 1 <= self.stride_steps <= self.sequence_steps:
            raise ConfigError(
                f"overlap_steps must be in [0, {self.sequence_steps - 1}], since sequences have "
                f"{self.sequence_steps} steps, not {self.overlap_steps}"
            )

    @property
    def sequence_steps(self) -> int:
        """Steps of a sampled sequence: burn-in, T, and what full returns need behind them."""
        behind = self.n_steps - 1 if self.full_returns else 0
        return self.burn_in_steps + self.unroll_steps + behind

    @property
    def stride_steps(self) -> int:
        """Steps from the start of one sequence to the start of the next."""
        if self.overlap_steps is None:
            return self.unroll_steps
        return self.sequence_steps - self.overlap_steps


class SequenceLoss(NamedTuple):
    """What one batch says of the weights."""

    total: Tensor  # scalar
    metrics: dict[str, Tensor]  # scalars, detached
    priority_B: Tensor  # [B] float32 > 0, in the rescaled unit


class R2d2:
    """Acts epsilon-greedily; learns n-step double-Q targets from sequences."""

    config_type = R2d2Config
    heads = "duelling"
    network = "r2d2"

    def __init__(
        self,
        model: nn.Module,
        config: R2d2Config,
        *,
        spec: EnvSpec,
        precision: torch.dtype = torch.float32,
    ) -> None:
        """Takes the network that learns, and makes the target network of it.

        Args:
            model: `networks.action_values.ActionValueNet`, or anything that is called alike.
            config: The learning rule's settings.
            spec: Of the environment.
            precision: dtype of the torso's arithmetic in updates; weights stay float32.

        Raises:
            ConfigError: actions are not one discrete choice.
        """
        space = spec.action_space
        if not isinstance(space, gym.spaces.Discrete):
            raise ConfigError(
                f"{spec.name}: r2d2 needs one discrete choice of action, not {space}: use "
                "--algorithm impala or ppo"
            )
        self.model = model
        self.target_model = copy.deepcopy(model).requires_grad_(False)
        self.eval_epsilon = config.eval_epsilon
        self.experience = ExperienceSpec(
            # Pieces that end where sequences do: each is complete as soon as it can be.
            unroll_steps=math.gcd(config.stride_steps, config.sequence_steps),
            batch_unrolls=config.batch_unrolls,
            replay=ReplaySpec(
                sequence_steps=config.sequence_steps,
                stride_steps=config.stride_steps,
                burn_in_steps=config.burn_in_steps,
                learned_steps=config.unroll_steps,
                settings=config.replay,
            ),
        )
        self._config = config
        self._precision = precision
        self._device_type = next(model.parameters()).device.type
        self._distribution = Categorical(int(space.n))
        self._optimizer = make_optimizer(model.parameters(), config.optimizer)
        self._updates = 0

    def exploration(self, num_envs: int) -> Tensor:
        """Epsilon of each environment that trains, float32 [num_envs]."""
        config = self._config
        return epsilon_ladder(num_envs, base=config.epsilon_base, power=config.epsilon_power)

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
        """Takes the best action that is allowed, but for a share `epsilon` of random ones.

        Modes "sample" and "epsilon" are the same; "greedy" is without the share.
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
            value=self._unscaled(sequences.chosen(value_NA, choice.best_N)),
            action_value=self._unscaled(sequences.chosen(value_NA, choice.action_N)),
        )
        return step, recurrent

    def loss(self, batch: Batch) -> SequenceLoss:
        """Returns the loss of a batch, its parts, and what to sample the sequences by."""
        config, steps = self._config, self._config.unroll_steps
        online_state, target_state = self._burned_in(batch)
        batch = sequences.without_burn_in(batch, config.burn_in_steps)
        with torch.no_grad():
            target, _ = self._run(self.target_model, batch.inputs, target_state)
        online, _ = self._run(self.model, batch.inputs, online_state)
        next_UB = self._best_value(online.value.detach(), target.value, batch.inputs.action_mask)
        final_value_RB, has_final_RB = self._finals(batch, online, target)
        target_TB = self._targets(batch, final_value_RB, next_UB)
        mask_TB = ~sequences.lacks_final(batch, has_final_RB, steps=config.n_steps)[:steps]
        value_TB = sequences.chosen(online.value[:steps], batch.action[:steps])
        td_error_TB = torch.where(mask_TB, self._scaled(target_TB) - value_TB, 0.0)
        loss_B = 0.5 * td_error_TB.square().mean(dim=0)  # masked steps count as without an error
        if batch.weight is not None:
            loss_B = batch.weight * loss_B
        total = loss_B.mean()
        priority_B = sequence_priority(td_error_TB, mask_TB, config.priority_eta) + _LEAST_PRIORITY
        metrics = {
            "loss/total": total.detach(),
            "loss/td_error_mean": td_error_TB.detach().abs().sum() / mask_TB.sum().clamp(min=1),
            "value_mean": self._unscaled(value_TB.detach()).mean(),
            "target_mean": target_TB.mean(),
            "priority_mean": priority_B.mean(),
            "truncated_skipped": (~mask_TB).sum().float(),
        }
        return SequenceLoss(total, metrics, priority_B)

    def update(self, batch: Batch, *, progress: float) -> Update:
        """Takes one gradient step on a batch, and copies the weights if it is time."""
        config = self._config
        total, metrics, priority_B = self.loss(batch)
        learning_rate = learning_rate_at(config.optimizer, progress)
        norm = clipped_step(
            self._optimizer,
            total,
            learning_rate=learning_rate,
            max_norm=config.optimizer.max_gradient_norm,
        )
        if isinstance(self.model, Observer):  # last: the loss saw by the statistics of before
            learned = batch.inputs.observation[config.burn_in_steps :][: config.unroll_steps]
            self.model.observe(learned[:, :, -1])
        self._updates += 1
        age = self._updates % config.target_update_interval
        if age == 0:
            models = self.target_model, self.model
            target, online = ([*model.parameters(), *model.buffers()] for model in models)
            with torch.no_grad():
                torch._foreach_copy_(target, online)
        metrics["gradient_norm"] = norm
        metrics["learning_rate"] = torch.tensor(learning_rate)
        metrics["target_age"] = torch.tensor(float(age))
        finite = torch.isfinite(total.detach()) & torch.isfinite(norm)
        return Update(metrics, finite, priority_B)

    @torch.no_grad()
    def initial_priority(self, batch: Batch) -> Tensor:
        """Priorities [B] of new sequences, by what the policy that acted said of its values.

        It stands for both networks. Observations are not looked at.

        Raises:
            ValueError: the batch lacks `value` or `action_value`.
        """
        config, steps = self._config, self._config.unroll_steps
        batch = sequences.without_burn_in(batch, config.burn_in_steps)
        if batch.value is None or batch.action_value is None:
            raise ValueError("initial priorities need value and action_value of every row")
        target_TB = self._targets(batch, batch.bootstrap, batch.value)
        td_error_TB = self._scaled(target_TB) - self._scaled(batch.action_value[:steps])
        every_TB = torch.ones_like(td_error_TB, dtype=torch.bool)
        return sequence_priority(td_error_TB, every_TB, config.priority_eta) + _LEAST_PRIORITY

    def warm_up(self, batch: Batch) -> None:
        """Runs the loss and its gradient once, and forgets them."""
        torch.autograd.backward(self.loss(batch).total)
        self._optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Returns the optimiser, the target network and the number of updates."""
        return {
            "optimizer": self._optimizer.state_dict(),
            "target": dict(self.target_model.state_dict()),
            "updates": self._updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        load_optimizer(self._optimizer, state["optimizer"])
        self.target_model.load_state_dict(state["target"])
        self._updates = state["updates"]

    @torch.no_grad()
    def _burned_in(self, batch: Batch) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """State of either network before the first learned row, from the one that was stored."""
        burn_in = self._config.burn_in_steps
        if not burn_in or not batch.recurrent:  # nothing warms up without a state
            return batch.recurrent, batch.recurrent
        inputs = sequences.rows_of(batch.inputs, slice(burn_in))
        _, online_state = self._run(self.model, inputs, batch.recurrent)
        _, target_state = self._run(self.target_model, inputs, batch.recurrent)
        return online_state, target_state

    def _run(
        self, model: nn.Module, inputs: PolicyInput, recurrent: tuple[Tensor, ...]
    ) -> tuple[Any, tuple[Tensor, ...]]:
        # A context for every call: within one, casts of weights that were made without a gradient
        # would be kept for the call that needs it.
        with torch.autocast(
            self._device_type, self._precision, enabled=self._precision != torch.float32
        ):
            output, recurrent = model(inputs, recurrent)
        return output, recurrent

    @torch.no_grad()
    def _finals(self, batch: Batch, online: Any, target: Any) -> tuple[Tensor, Tensor]:
        """Values of final observations, else 0 [R, B], and where there is one [R, B]."""
        finals = batch.finals
        if finals is None:
            return torch.zeros_like(target.value[1:, :, 0]), torch.zeros_like(batch.truncated)
        inputs, at = sequences.final_inputs(batch, finals), (finals.step, finals.column)
        # One step on from the state after the row that the clock ended.
        value_1FA = [
            self._run(model, inputs, tuple(part[at] for part in output.states))[0].value
            for model, output in ((self.model, online), (self.target_model, target))
        ]
        value_F = self._best_value(value_1FA[0], value_1FA[1], None)[0]
        return sequences.in_place(value_F, finals, shape=batch.truncated.shape)

    def _best_value(
        self, online_UBA: Tensor, target_UBA: Tensor, mask_UBA: Tensor | None
    ) -> Tensor:
        """Value [U, B] of the best action that is allowed, in the unit of the rewards."""
        choose_UBA = online_UBA if self._config.double_q else target_UBA
        best_UB = self._distribution.masked(choose_UBA, mask_UBA).argmax(dim=-1)
        return self._unscaled(sequences.chosen(target_UBA, best_UB))

    def _targets(self, batch: Batch, final_value_RB: Tensor, value_UB: Tensor) -> Tensor:
        """Targets [T, B] of the learned steps, in the unit of the rewards."""
        config = self._config
        reward_RB = transform_reward(config.reward_scale * batch.reward, config.reward_transform)
        return sequences.n_step_returns(
            batch,
            reward_RB,
            final_value_RB,
            value_UB,
            discount=config.discount,
            steps=config.n_steps,
        )[: config.unroll_steps]

    def _scaled(self, value: Tensor) -> Tensor:
        config = self._config
        return rescale(value, config.value_scale_epsilon) if config.rescale_values else value

    def _unscaled(self, value: Tensor) -> Tensor:
        config = self._config
        return unrescale(value, config.value_scale_epsilon) if config.rescale_values else value
