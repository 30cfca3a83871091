"""One batch of observations: what the policy is shown, and what it is left with."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from headrace import catalog
from headrace.algorithms.base import ActionMode
from headrace.config import RunConfig, completed
from headrace.networks.models import NetworkConfig
from headrace.pools.base import Pool
from headrace.records import PolicyInput, PolicyState, PolicyStep
from headrace.run.build import make_algorithm, make_model
from headrace.run.policy import Policy
from headrace.server.acting import Actor, cleared, initial_state
from headrace.server.server import Seat
from headrace.specs import EnvSpec
from headrace.steps import EnvStep
from headrace.telemetry.metrics import Waits

CPU = torch.device("cpu")
SPEC = EnvSpec(
    name="numbers",
    observation_space=gym.spaces.Box(-1e6, 1e6, (2,), np.float32),
    action_space=gym.spaces.Discrete(3),
    frame_stack=3,
)


class Echo:
    """Keeps what it was shown; chooses action 1; counts in its recurrent state."""

    def __init__(self) -> None:
        self.inputs: PolicyInput | None = None

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        return (torch.zeros(batch, 4),)

    def act(
        self, model: Any, inputs: PolicyInput, recurrent: tuple[Tensor, ...], **_: Any
    ) -> tuple[PolicyStep, tuple[Tensor, ...]]:
        self.inputs = inputs
        count = inputs.reward.shape[1]
        step = PolicyStep(
            torch.ones(count, dtype=torch.int64), torch.zeros(count), torch.ones(count)
        )
        return step, (recurrent[0] + 1,)


def test_an_episode_starts_with_zeros_and_no_action() -> None:
    state = initial_state(SPEC, Echo(), 2, CPU)
    assert state.stack.shape == (2, 3, 2)
    assert state.stack.dtype == torch.float32
    assert not state.stack.any()
    assert not state.recurrent[0].any()
    assert state.previous_action.tolist() == [-1, -1]


def test_frames_push_older_ones_out() -> None:
    echo = Echo()
    actor = Actor(algorithm=echo, model=echo)
    state = initial_state(SPEC, echo, 1, CPU)
    no = torch.zeros(1, dtype=torch.bool)
    for number in range(1, 5):
        _, state = actor.act(state, torch.full((1, 2), float(number)), torch.ones(1), no)
    assert echo.inputs is not None
    assert echo.inputs.observation.shape == (1, 1, 3, 2)
    assert echo.inputs.observation[0, 0, :, 0].tolist() == [2, 3, 4]
    assert echo.inputs.previous_action.tolist() == [[1]]
    assert state.recurrent[0].tolist() == [[4] * 4]


def test_a_cleared_row_is_as_new_and_its_neighbour_is_untouched() -> None:
    state = PolicyState(torch.ones(2, 3, 2), (torch.full((2, 4), torch.nan),), torch.ones(2).long())
    after = cleared(state, torch.tensor([True, False]))
    assert not after.stack[0].any()
    assert (after.stack[1] == 1).all()
    # A NaN must not live on in the next episode.
    assert (after.recurrent[0][0] == 0).all()
    assert after.recurrent[0][1].isnan().all()
    assert after.previous_action.tolist() == [-1, 1]
    assert (state.stack == 1).all(), "the state that was given is the caller's"


def test_the_reward_of_the_last_episode_is_not_shown() -> None:
    echo = Echo()
    state = initial_state(SPEC, echo, 2, CPU)
    reset = torch.tensor([True, False])
    Actor(algorithm=echo, model=echo).act(state, torch.zeros(2, 2), torch.tensor([5.0, 6.0]), reset)
    assert echo.inputs is not None
    assert echo.inputs.reward.tolist() == [[0, 6]]
    assert echo.inputs.reset.tolist() == [[True, False]]


def make_policy(env: str, network: str, *, lstm_size: int, seed: int = 1) -> Policy:
    config = completed(
        RunConfig(
            env=env,
            seed=seed,
            device="cpu",
            lockstep=True,
            network=NetworkConfig(network=network, lstm_size=lstm_size),
        )
    )
    spec = catalog.environment_family(env).spec(env, config.environment)
    model: Any = make_model(config, spec, CPU)
    with torch.no_grad():
        # A fresh policy is nearly uniform: scaled up, its choices depend on all that it sees.
        model.policy.weight.mul_(1000)
    return Policy(config, make_algorithm(config, model, spec, torch.float32), spec, CPU)


class Recorded:
    """A pool that keeps what it was replied."""

    def __init__(self, pool: Pool) -> None:
        self.spec, self.num_envs, self.max_batch = pool.spec, pool.num_envs, pool.max_batch
        self.actions: list[list[int]] = []
        self._pool = pool

    def receive(self, timeout_s: float) -> EnvStep | None:
        return self._pool.receive(timeout_s)

    def reply(self, action: np.ndarray) -> None:
        self.actions.append(action.tolist())
        self._pool.reply(action)

    def close(self) -> None:
        self._pool.close()


def actions_at_a_seat(
    policy: Policy, *, num_envs: int, steps: int, mode: ActionMode = "greedy"
) -> list[list[int]]:
    pool = Recorded(policy.make_pool(num_envs=num_envs, batch_size=num_envs, seed=3))
    seat = Seat(
        pool,
        policy.actor(mode, 0.0),
        policy.initial_state(1),
        unrolls=None,
        on_episodes=lambda *_: None,
        device=CPU,
    )
    waits = Waits()
    while len(pool.actions) < steps:
        seat.serve(lambda: 0, 1.0, waits)
    pool.close()
    return pool.actions


def actions_in_a_loop(
    policy: Policy, *, steps: int, mode: ActionMode = "greedy"
) -> list[list[int]]:
    env = policy.make_env(seed=3)
    state, actions = policy.initial_state(1), []
    observation, _ = env.reset()
    reward, reset = 0.0, True
    for _ in range(steps):
        action, state = policy.act(observation, state, reward=reward, reset=reset, mode=mode)
        assert isinstance(action, int)
        actions.append([action])
        observation, reward, terminated, truncated, _ = env.step(action)
        reset = terminated or truncated
        if reset:
            observation, _ = env.reset()
    env.close()
    return actions


@pytest.mark.parametrize("env", ["catch", "recall"])
@pytest.mark.parametrize("lstm_size", [0, 16])
def test_a_users_loop_plays_as_the_server_does(env: str, lstm_size: int) -> None:
    for seed in range(20):
        policy = make_policy(env, "mlp", lstm_size=lstm_size, seed=seed)
        at_a_seat = actions_at_a_seat(policy, num_envs=1, steps=60)
        if len({action for (action,) in at_a_seat}) > 1:  # a constant policy shows nothing
            break
    else:
        pytest.fail("every policy was constant")
    assert actions_in_a_loop(policy, steps=60) == at_a_seat


@pytest.mark.parametrize("env", ["catch", "recall"])
def test_a_users_loop_over_many_plays_as_the_server_does(env: str) -> None:
    policy = make_policy(env, "mlp", lstm_size=16)
    pool = policy.make_pool(num_envs=5, batch_size=5, seed=3)
    state, actions = policy.initial_state(5), []
    for _ in range(40):
        step = pool.receive(0.0)
        assert step is not None
        action, state = policy.act(step.observation, state, reward=step.reward, reset=step.reset)
        assert isinstance(action, np.ndarray)
        actions.append(action.tolist())
        pool.reply(action)
    assert actions == actions_at_a_seat(policy, num_envs=5, steps=40)


def test_a_users_loop_plays_an_atari_game_as_the_server_does() -> None:
    pytest.importorskip("ale_py")
    # Two of them: drawing moves a policy's generator on.
    one, other = (make_policy("ALE/Pong-v5", "impala_shallow", lstm_size=16) for _ in range(2))
    at_a_seat = actions_at_a_seat(one, num_envs=1, steps=200, mode="sample")
    assert len({action for (action,) in at_a_seat}) > 1
    assert actions_in_a_loop(other, steps=200, mode="sample") == at_a_seat


def test_act_refuses_what_does_not_fit_the_state() -> None:
    policy = make_policy("catch", "mlp", lstm_size=0)
    with pytest.raises(ValueError, match=r"must be \(2, 10, 5\)"):
        policy.act(np.zeros((3, 10, 5)), policy.initial_state(2))


def test_act_leaves_the_callers_state_alone() -> None:
    policy = make_policy("recall", "mlp", lstm_size=8)
    _, state = policy.act(np.ones(3), policy.initial_state(1), reset=True)
    before = [part.clone() for part in (state.stack, *state.recurrent, state.previous_action)]
    again = [policy.act(np.ones(3), state, reward=1.0)[0] for _ in range(3)]
    assert len(set(again)) == 1
    after = (state.stack, *state.recurrent, state.previous_action)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
