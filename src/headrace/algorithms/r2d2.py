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
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from headrace.algorithms import sequences
from headrace.algorithms.acting import act_by_values, one_choice
from headrace.algorithms.base import (
    VALUES_METRICS,
    ActionMode,
    Algorithm,
    ExperienceSpec,
    Model,
    ReplaySpec,
)
from headrace.algorithms.exploration import AnnealedEpsilon
from headrace.algorithms.optimizers import (
    clipped_step,
    hidden_weights,
    learning_rate_at,
    load_optimizer,
    make_optimizer,
)
from headrace.algorithms.r2d2_config import R2d2Config
from headrace.networks.modes import frozen, in_eval_mode
from headrace.networks.normalizer import Observer
from headrace.ops.exploration import epsilon_ladder
from headrace.ops.priorities import sequence_priority
from headrace.ops.rewards import transform_reward
from headrace.ops.value_scale import rescale, unrescale
from headrace.records import Batch, PolicyInput, PolicyStep, Update
from headrace.specs import EnvSpec

__all__ = ["R2d2", "R2d2Config"]

_LEAST_PRIORITY = 1e-6
"""Added to all priorities: a sequence without an error must not be lost for good."""
_LEAST_PIECE_STEPS = 16


def _piece_steps(config: R2d2Config, *, is_recurrent: bool) -> int:
    """Returns c, the steps in which experience comes to the replay.

    A piece costs as much to hand over as ten steps, so it should not be short. With a recurrent
    state, sequences must start where pieces do; where they also end there, each is complete as soon
    as it can be.
    """
    stride = config.stride_steps
    if not is_recurrent:
        return stride * -(-_LEAST_PIECE_STEPS // stride)
    fitting = math.gcd(stride, config.sequence_steps)
    pieces = (c for c in range(fitting, stride + 1, fitting) if stride % c == 0)
    return next((c for c in pieces if c >= _LEAST_PIECE_STEPS), stride)


class SequenceLoss(NamedTuple):
    """What one batch says of the weights."""

    total: Tensor  # scalar
    metrics: dict[str, Tensor]  # scalars, detached
    priority_B: Tensor  # [B] float32 > 0, in the rescaled unit


class R2d2(Algorithm):
    """Acts epsilon-greedily; learns n-step double-Q targets from sequences."""

    config_type = R2d2Config
    heads = "duelling"
    network = "r2d2"
    averages_gradients = True
    shown = VALUES_METRICS
    target_model: nn.Module

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
        self._distribution = one_choice("r2d2", spec)
        is_recurrent = bool(cast(Any, model).initial_state(1))
        if not is_recurrent:  # nothing to warm up
            config = dataclasses.replace(config, burn_in_steps=0)
        experience = ExperienceSpec(
            unroll_steps=_piece_steps(config, is_recurrent=is_recurrent),
            batch_unrolls=config.batch_unrolls,
            replay=ReplaySpec(
                sequence_steps=config.sequence_steps,
                stride_steps=config.stride_steps,
                burn_in_steps=config.burn_in_steps,
                learned_steps=config.unroll_steps,
                settings=config.replay,
                judges_new=True,
            ),
        )
        super().__init__(model, experience)
        self.target_model = frozen(copy.deepcopy(model))
        self.eval_epsilon = config.eval_epsilon
        self._config = config
        self._precision = precision
        self._device_type = next(model.parameters()).device.type
        self._optimizer = make_optimizer(
            model.parameters(), config.optimizer, hidden=hidden_weights(model)
        )
        self._epsilon = AnnealedEpsilon(
            model,
            config.epsilon_schedule,
            initial=config.initial_epsilon,
            decay=config.epsilon_decay,
            fix="say --epsilon-schedule constant",
        )
        self._updates = 0

    def exploration(self, num_envs: int) -> Tensor:
        """Epsilon of each environment that trains, float32 [num_envs]."""
        config = self._config
        return epsilon_ladder(num_envs, base=config.epsilon_base, power=config.epsilon_power)

    def annealed(self, model: Any, epsilon: Tensor) -> Tensor:
        """Epsilon [N] of environments now, of those that they come to."""
        return self._epsilon.at(model, epsilon)

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
        """Acts epsilon-greedily; see `act_by_values`."""
        return act_by_values(
            model,
            inputs,
            recurrent,
            mode=mode,
            generator=generator,
            epsilon=epsilon,
            in_reward_unit=self._unscaled,
        )

    def loss(self, batch: Batch) -> SequenceLoss:
        """Returns the loss of a batch, its parts, and what to sample the sequences by."""
        config, steps = self._config, self._config.unroll_steps
        burn_in, learned = batch, sequences.without_burn_in(batch, config.burn_in_steps)

        def of_target() -> Any:
            with torch.no_grad():  # in whichever thread this is
                state = self._burned_in(self.target_model, burn_in)
                return self._run(self.target_model, learned.inputs, state)[0]

        target_later = self.beside(of_target)
        with torch.no_grad(), in_eval_mode(self.model):  # as the policy that acted got there
            online_state = self._burned_in(self.model, burn_in)
        batch = learned
        online, _ = self._run(self.model, batch.inputs, online_state)
        target = target_later()
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
            learners=self.learners,
        )
        if isinstance(self.model, Observer):  # last: the loss saw by the statistics of before
            learned = batch.inputs.observation[config.burn_in_steps :][: config.unroll_steps]
            self.model.observe(learned[:, :, -1])
        self._epsilon.advance(progress)
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
        if self._epsilon.left is not None:
            metrics["exploration_left"] = self._epsilon.left.clone()
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
            "exploration_left": self._epsilon.left,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        load_optimizer(self._optimizer, state["optimizer"])
        self.target_model.load_state_dict(state["target"])
        self._updates = state["updates"]
        self._epsilon.load(state.get("exploration_left"))  # runs of 0.1 have none

    def _burned_in(self, model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
        """State of a network before the first learned row, from the one that was stored."""
        burn_in = self._config.burn_in_steps
        if not burn_in:
            return batch.recurrent
        inputs = sequences.rows_of(batch.inputs, slice(burn_in))
        return self._run(model, inputs, batch.recurrent)[1]

    def _run(
        self,
        model: Callable[..., Any],
        inputs: PolicyInput,
        recurrent: tuple[Tensor, ...],
    ) -> tuple[Any, tuple[Tensor, ...]]:
        # A context for every call, so that its cache of cast weights never serves both calls with a
        # gradient and calls without.
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
        # One step on from the state after the row that the clock ended; `forward`, since code that
        # is compiled would be so anew for every F.
        with in_eval_mode(self.model):
            value_1FA = [
                self._run(model.forward, inputs, tuple(part[at] for part in output.states))[0].value
                for model, output in ((self.model, online), (self.target_model, target))
            ]
        value_F = self._best_value(value_1FA[0], value_1FA[1], inputs.action_mask)[0]
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
