"""R2D2's update beside the published one, its fixed point under a clock, and how it acts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headrace.algorithms.base import ReplayConfig
from headrace.algorithms.optimizers import OptimizerConfig
from headrace.algorithms.r2d2 import R2d2, R2d2Config
from headrace.errors import ConfigError
from headrace.ops.value_scale import rescale, unrescale
from headrace.records import Batch, Finals, PolicyInput
from headrace.specs import EnvSpec

STATES, ACTIONS = 10, 3
MakeSpec = Callable[..., EnvSpec]


class Values(NamedTuple):
    value: Tensor
    states: tuple[Tensor, ...]


class Table(nn.Module):
    """Q of every state, looked up by the number that the observation is."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.zeros(STATES, ACTIONS))
        self.register_buffer("seen", torch.zeros(()))

    def forward(
        self, inputs: PolicyInput, recurrent: tuple[Tensor, ...]
    ) -> tuple[Values, tuple[Tensor, ...]]:
        return Values(self.q[inputs.observation[:, :, 0, 0].long()], ()), recurrent

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        return ()

    def observe(self, frames: Tensor) -> None:
        self.seen += frames.numel()


SPEC = EnvSpec(
    name="table",
    observation_space=gym.spaces.Box(0, STATES, (1,), np.float32),
    action_space=gym.spaces.Discrete(ACTIONS),
)


def adam(**settings: Any) -> OptimizerConfig:
    return OptimizerConfig(
        **{
            "optimizer": "adam",
            "learning_rate": 0.05,
            "learning_rate_schedule": "linear",
            "max_gradient_norm": 0.0,
            **settings,
        }
    )


def dqn_of(model: nn.Module, **settings: Any) -> R2d2:
    """Feed-forward, no burn-in: the plain setting of the same rule."""
    plain = {"burn_in_steps": 0, "unroll_steps": 1, "n_steps": 1, "discount": 0.5}
    return R2d2(model, R2d2Config(**{**plain, **settings}), spec=SPEC)


def a_batch(state_UB: Tensor, **fields: Any) -> Batch:
    shape = (len(state_UB) - 1, state_UB.shape[1])
    never = torch.zeros(shape, dtype=torch.bool)
    batch = Batch(
        inputs=PolicyInput(
            observation=state_UB.float()[:, :, None, None],
            reward=torch.zeros(state_UB.shape),
            previous_action=torch.full(state_UB.shape, -1),
            reset=torch.zeros(state_UB.shape, dtype=torch.bool),
        ),
        recurrent=(),
        action=torch.zeros(shape, dtype=torch.int64),
        log_prob=torch.zeros(shape),
        reward=torch.zeros(shape),
        terminated=never,
        truncated=never,
        bootstrap=torch.zeros(shape),
        version=torch.zeros(shape, dtype=torch.int64),
    )
    return batch._replace(**fields)


@pytest.mark.parametrize("end", ["truncated", "terminated"])
@pytest.mark.parametrize("rescale_values", [True, False])
def test_a_clock_that_cuts_episodes_does_not_lower_the_value(
    rescale_values: bool, end: str
) -> None:
    # Ten states in a ring, reward 1 for ever; every tenth step ends the episode.
    table = Table()
    with torch.no_grad():
        table.q[:, 1:] = -5.0  # never done, and never the best
    dqn = dqn_of(
        table,
        unroll_steps=20,
        n_steps=5,
        discount=0.9,
        rescale_values=rescale_values,
        target_update_interval=10,
        optimizer=adam(learning_rate=0.3),
    )
    state_UB = (torch.arange(21)[:, None] + torch.arange(5)) % STATES
    ended = state_UB[1:] == 0
    step, column = ended.nonzero().unbind(1)
    finals = Finals(
        torch.zeros(len(step), 1, 1), step, column, torch.ones(len(step), dtype=torch.bool)
    )
    batch = a_batch(state_UB, reward=torch.ones(ended.shape), finals=finals, **{end: ended})
    updates = 500
    for update in range(updates):
        assert dqn.update(batch, progress=update / updates).finite
    learned = table.q.detach()[:, 0]
    learned = unrescale(learned) if rescale_values else learned
    left = torch.arange(STATES, 0, -1)  # steps to the end
    truth = 10 * (1 - 0.9**left) if end == "terminated" else torch.full((STATES,), 10.0)
    torch.testing.assert_close(learned, truth, atol=0.02, rtol=0.0)


@pytest.mark.parametrize(("reward", "clips"), [(4.0, False), (40_000.0, True)])
def test_a_step_is_that_of_the_published_summed_loss(reward: float, clips: bool) -> None:
    T, B, eps, clip = 8, 4, 1e-3, 80.0
    generator = torch.Generator().manual_seed(1)
    table = Table()
    with torch.no_grad():
        table.q.normal_(generator=generator)
    published = copy.deepcopy(table)
    converted = adam(
        learning_rate=1e-2,
        learning_rate_schedule="constant",
        optimizer_eps=eps / T,
        max_gradient_norm=clip / T,
    )
    dqn = dqn_of(table, unroll_steps=T, batch_unrolls=B, optimizer=converted)
    optimizer = torch.optim.Adam(published.parameters(), lr=1e-2, eps=eps)
    for _ in range(3):
        batch = a_batch(
            torch.randint(STATES, (T + 1, B), generator=generator),
            action=torch.randint(ACTIONS, (T, B), generator=generator),
            reward=reward * torch.randn(T, B, generator=generator),
            terminated=torch.ones(T, B, dtype=torch.bool),
            weight=torch.rand(B, generator=generator),
        )
        norm = dqn.update(batch, progress=0.0).metrics["gradient_norm"]
        states, actions = batch.inputs.observation[:-1, :, 0, 0].long(), batch.action
        td_error_TB = rescale(batch.reward) - published.q[states, actions]
        optimizer.zero_grad()
        (batch.weight * 0.5 * td_error_TB.square().sum(dim=0)).mean().backward()
        summed = nn.utils.clip_grad_norm_(published.parameters(), clip)
        assert (summed > clip) == clips
        assert T * norm.item() == pytest.approx(summed.item(), rel=1e-5)
        optimizer.step()
    torch.testing.assert_close(table.q, published.q, atol=1e-6, rtol=1e-6)


def test_the_defaults_are_converted_for_their_length() -> None:
    config = R2d2Config()
    assert config.optimizer.optimizer_eps * config.unroll_steps == pytest.approx(1e-3)
    assert config.optimizer.max_gradient_norm * config.unroll_steps == pytest.approx(80)


@pytest.mark.parametrize(
    ("double_q", "allowed", "value"),
    [(True, None, 5.0), (False, None, 10.0), (True, [0, 2], 7.0), (False, [1, 2], 7.0)],
)
def test_the_network_that_learns_chooses_and_the_target_network_values(
    double_q: bool, allowed: list[int] | None, value: float
) -> None:
    table = Table()
    with torch.no_grad():
        table.q[1] = torch.tensor([10.0, 5.0, 7.0])
    dqn = dqn_of(table, double_q=double_q, rescale_values=False)
    with torch.no_grad():  # after the copy was made
        table.q[0, 0] = 0.25
        table.q[1] = torch.tensor([1.0, 3.0, 2.0])
    batch = a_batch(torch.tensor([[0], [1]]), reward=torch.ones(1, 1))
    if allowed is not None:
        mask = torch.zeros(2, 1, ACTIONS, dtype=torch.bool)
        mask[1, 0, allowed] = True
        batch = batch._replace(inputs=batch.inputs._replace(action_mask=mask))
    total, metrics, priority_B = dqn.loss(batch)
    td_error = 1 + 0.5 * value - 0.25
    assert priority_B.item() == pytest.approx(td_error, rel=1e-5)
    assert total.item() == pytest.approx(0.5 * td_error**2)
    assert metrics["target_mean"].item() == pytest.approx(1 + 0.5 * value)
    assert metrics["value_mean"].item() == 0.25
    total.backward()
    assert table.q.grad is not None
    assert table.q.grad[1].abs().sum() == 0, "targets are constants"


def test_weights_go_to_the_target_network_when_it_is_time() -> None:
    table = Table()
    dqn = dqn_of(table, target_update_interval=3, optimizer=adam())
    batch = a_batch(torch.tensor([[0], [1]]), reward=torch.ones(1, 1))
    ages, same = [], []
    for _ in range(7):
        ages.append(dqn.update(batch, progress=0.0).metrics["target_age"].item())
        networks = dqn.target_model.state_dict(), table.state_dict()
        pairs = zip(networks[0].values(), networks[1].values(), strict=True)
        same.append(all(torch.equal(a, b) for a, b in pairs))
    assert ages == [1, 2, 0, 1, 2, 0, 1]
    assert same == [age == 0 for age in ages]
    assert table.seen == 7, "one frame of each update was learned from"
    assert not any(parameter.requires_grad for parameter in dqn.target_model.parameters())


def test_warming_up_learns_nothing() -> None:
    table = Table()
    dqn = dqn_of(table)
    dqn.warm_up(a_batch(torch.tensor([[0], [1]]), reward=torch.ones(1, 1)))
    assert not table.q.any()
    assert table.q.grad is None
    assert dqn.state_dict()["updates"] == 0


COUNT = 20_000


def acted(mode: Any, epsilon: float | Tensor, *, mask: Tensor | None = None) -> Any:
    table = Table()
    with torch.no_grad():
        table.q[0] = torch.tensor([-1.0, 2.0, 1.0])
    inputs = a_batch(torch.zeros(1, COUNT)).inputs._replace(
        action_mask=None if mask is None else mask.expand(1, COUNT, ACTIONS)
    )
    with torch.no_grad():
        step, recurrent = dqn_of(Table()).act(
            table,
            inputs,
            (),
            mode=mode,
            epsilon=epsilon,
            generator=torch.Generator().manual_seed(0),
        )
    assert recurrent == ()
    assert step.env_action is None
    torch.testing.assert_close(step.action_value, unrescale(table.q[0].detach())[step.action])
    return step


def shares(action: Tensor) -> list[float]:
    return (torch.bincount(action, minlength=ACTIONS) / len(action)).tolist()


@pytest.mark.parametrize("mode", ["sample", "epsilon"])
def test_each_environment_explores_by_its_own_epsilon(mode: Any) -> None:
    epsilon_N = torch.tensor([0.0, 0.6]).repeat_interleave(COUNT // 2)
    step = acted(mode, epsilon_N)
    assert shares(step.action[: COUNT // 2]) == [0, 1, 0]
    assert shares(step.action[COUNT // 2 :]) == pytest.approx([0.2, 0.6, 0.2], abs=0.015)
    prob_N = torch.where(step.action == 1, 1 - epsilon_N * 2 / 3, epsilon_N / 3)
    torch.testing.assert_close(step.log_prob.exp(), prob_N)
    # The value is the best action's, whatever was done.
    torch.testing.assert_close(step.value, unrescale(torch.tensor(2.0)).expand(COUNT))


def test_greedy_takes_the_best_whatever_epsilon_is() -> None:
    step = acted("greedy", 0.9)
    assert shares(step.action) == [0, 1, 0]
    assert (step.log_prob == 0).all()
    assert torch.equal(step.value, step.action_value)


@pytest.mark.parametrize("mode", ["sample", "greedy", "epsilon"])
def test_no_mode_takes_what_the_mask_forbids(mode: Any) -> None:
    step = acted(mode, 0.5, mask=torch.tensor([True, False, True]))
    random = 0.0 if mode == "greedy" else 0.25
    assert shares(step.action) == pytest.approx([random, 0, 1 - random], abs=0.015)
    prob_N = torch.where(step.action == 2, 1 - random, random)
    torch.testing.assert_close(step.log_prob.exp(), prob_N)
    torch.testing.assert_close(step.value, unrescale(torch.tensor(1.0)).expand(COUNT))


def test_plain_values_are_not_unrescaled() -> None:
    table = Table()
    nn.init.constant_(table.q, 3.0)
    inputs = a_batch(torch.zeros(1, 2)).inputs
    step, _ = dqn_of(table, rescale_values=False).act(table, inputs, (), mode="greedy")
    assert step.value.tolist() == [3, 3]


def test_every_environment_has_its_rung() -> None:
    dqn = dqn_of(Table(), epsilon_base=0.5, epsilon_power=3.0, eval_epsilon=0.02)
    torch.testing.assert_close(dqn.exploration(4), torch.tensor([0.5, 0.25, 0.125, 0.0625]))
    torch.testing.assert_close(dqn.exploration(1), torch.tensor([0.5]))
    assert dqn.eval_epsilon == 0.02


@pytest.mark.parametrize(
    ("settings", "sequence", "stride", "pieces"),
    [
        ({}, 120, 80, (40, 80)),
        ({"overlap_steps": 40}, 120, 40, (40, 40)),
        ({"full_returns": True}, 124, 80, (16, 80)),
        (
            {"burn_in_steps": 0, "unroll_steps": 1, "n_steps": 3, "full_returns": True},
            3,
            1,
            (1, 16),
        ),
        ({"burn_in_steps": 0, "unroll_steps": 3, "n_steps": 1}, 3, 3, (3, 18)),
        ({"burn_in_steps": 0, "unroll_steps": 16}, 16, 16, (16, 16)),
    ],
)
@pytest.mark.parametrize("is_recurrent", [True, False])
def test_how_the_stream_is_cut(
    settings: dict[str, Any],
    sequence: int,
    stride: int,
    pieces: tuple[int, int],
    is_recurrent: bool,
) -> None:
    kept = ReplayConfig(replay_capacity=777)
    config = R2d2Config(**settings, batch_unrolls=6, replay=kept)
    model: Any = Table()
    if is_recurrent:
        model.initial_state = lambda batch: (torch.zeros(batch, 2),)
    experience = R2d2(model, config, spec=SPEC).experience
    assert experience.replay is not None
    burn_in = config.burn_in_steps if is_recurrent else 0  # else there is nothing to warm up
    assert experience.replay.sequence_steps == sequence - config.burn_in_steps + burn_in
    assert experience.replay.stride_steps == stride
    assert experience.replay.burn_in_steps == burn_in
    assert experience.replay.settings is kept
    assert experience.unroll_steps == pieces[not is_recurrent]
    assert experience.samples_per_update == config.unroll_steps * 6


@pytest.mark.parametrize(
    "settings",
    [
        {"unroll_steps": 0},
        {"batch_unrolls": 0},
        {"n_steps": 0},
        {"target_update_interval": 0},
        {"burn_in_steps": -1},
        {"value_scale_epsilon": -1e-3},
        {"epsilon_power": -1.0},
        {"discount": 1.01},
        {"priority_eta": -0.1},
        {"epsilon_base": 1.5},
        {"eval_epsilon": 2.0},
        {"overlap_steps": 120},
        {"overlap_steps": -1},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        R2d2Config(**settings)


@pytest.mark.parametrize("kind", ["multi", "continuous"])
def test_other_actions_than_one_choice_are_refused(spec_of: MakeSpec, kind: str) -> None:
    with pytest.raises(ConfigError, match=r"Test-v0.*--algorithm impala or ppo"):
        R2d2(Table(), R2d2Config(), spec=spec_of(kind))
