"""EnvPool itself: that it does what the fake one of `test_envpool` does, and what specs say."""

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from headrace.envs.envpool import ENVPOOL, EnvpoolConfig
from headrace.errors import ConfigError
from headrace.pools.native import NativePool
from headrace.steps import EnvStep

pytest.importorskip("envpool")

Array = np.ndarray[Any, Any]


def real_pool(name: str, num_envs: int, batch_size: int, **settings: Any) -> NativePool:
    config = EnvpoolConfig(**settings)
    env = ENVPOOL.make(
        "envpool:" + name, config, num_envs=num_envs, batch_size=batch_size, threads=2, seed=3
    )
    return NativePool(env, batch_size=batch_size)


def play(pool: NativePool, rounds: int) -> Iterator[EnvStep]:
    space, rng = pool.spec.action_space, np.random.default_rng(0)
    for _ in range(rounds):
        step = pool.receive(30.0)
        assert step is not None
        yield step
        rows, shape = len(step.env_id), pool.spec.action_shape
        if isinstance(space, gym.spaces.Box):
            action = rng.uniform(space.low, space.high, (rows, *shape)).astype(np.float32)
        else:
            action = rng.integers(
                0, pool.spec.action_choices, (rows, len(pool.spec.action_choices))
            )
            action = action.reshape(rows, *shape)
        pool.reply(action)


REAL = [
    "HalfCheetah-v5",
    "CartPole-v1",
    "Pong-v5",
    "WalkerRun-v1",
    "FrozenLake-v1",
    "MiniGrid-Empty-5x5-v0",
    "Cleaner-v0",
]


@pytest.mark.parametrize("name", REAL)
def test_real_rows_lie_in_the_space_and_flags_agree(name: str) -> None:
    pool = real_pool(name, 4, 2)
    assert pool.spec == ENVPOOL.spec("envpool:" + name, EnvpoolConfig())
    seen = set()
    for step in play(pool, 120):
        assert all(pool.spec.observation_space.contains(row) for row in step.observation)
        new = np.array([env not in seen for env in step.env_id.tolist()])
        seen |= set(step.env_id.tolist())
        ended = step.terminated | step.truncated
        np.testing.assert_array_equal(step.reset, ended | new)
        assert not (step.terminated & step.truncated).any()
        assert (step.final_observation is not None) == ended.any()
        assert step.reward.dtype == np.float32
    assert len(seen) == 4


@pytest.mark.parametrize(("name", "limit"), [("HalfCheetah-v5", 1000), ("CartPole-v1", 500)])
def test_the_clock_truncates_at_the_environments_own_limit(name: str, limit: int) -> None:
    steps = list(play(real_pool(name, 2, 2), 1100))
    truncated = [at for at, step in enumerate(steps) if step.truncated.any()]
    if name == "CartPole-v1":  # random play falls long before its clock
        assert not truncated
        assert sum(int(step.terminated.sum()) for step in steps) > 40
    else:
        assert truncated == [limit]
        assert not any(step.terminated.any() for step in steps)


def test_an_asked_limit_truncates() -> None:
    pool = real_pool("HalfCheetah-v5", 2, 2, max_episode_steps=7)
    steps = list(play(pool, 30))
    assert [at for at, step in enumerate(steps) if step.truncated.all()] == [7, 14, 21, 28]


def test_a_real_ended_row_is_merged() -> None:
    pool = real_pool("CartPole-v1", 3, 3)
    ends = 0
    for step in play(pool, 200):
        for row in np.flatnonzero(step.terminated):
            assert step.final_observation is not None
            position, _, angle, _ = np.abs(step.final_observation[row])
            assert position > 2.4 or angle > 0.2095
            assert (np.abs(step.observation[row]) <= 0.05).all()
            assert step.reward[row] == 1.0
            ends += 1
    assert ends > 15


def test_real_copies_differ_and_a_seed_repeats() -> None:
    def looks() -> Array:
        return np.stack([step.observation for step in play(real_pool("Hopper-v5", 3, 3), 6)])

    one = looks()
    np.testing.assert_array_equal(one, looks())
    assert (one[0, 0] != one[0, 1]).any()


def test_football_is_one_unstacked_image() -> None:
    name = "envpool:gfootball/11_vs_11_easy_stochastic-v1"
    spec = ENVPOOL.spec(name, EnvpoolConfig())
    assert spec.observation_space.shape == (72, 96, 4)
    assert spec.frame_stack == 4
    assert spec.num_actions == 19


def test_what_envpool_cannot_start_is_one_sentence() -> None:
    """Its wheel of 1.2.5 has no puzzles."""
    with pytest.raises(ConfigError, match="Sudoku-v0: EnvPool refuses"):
        real_pool("Sudoku-v0", 2, 2)
