"""One environment of a pool as a Gymnasium environment."""

import numpy as np
import pytest

from headrace.envs.catch import CATCH, CatchConfig
from headrace.errors import ConfigError, DeadlineExceeded
from headrace.pools.inline import InlinePool
from headrace.pools.single import PoolEnv
from headrace.steps import EnvStep


def make_pool(*, num_envs: int = 1, truncate_after: int = 0) -> InlinePool:
    config = CatchConfig(truncate_after=truncate_after)
    env = CATCH.make("catch", config, num_envs=num_envs, batch_size=1, threads=1, seed=0)
    return InlinePool(env, batch_size=1)


def test_an_episode_ends_with_its_final_observation() -> None:
    env = PoolEnv(make_pool())
    observation, _ = env.reset()
    assert observation[0].sum() == 1.0
    for step in range(1, 10):
        observation, reward, terminated, truncated, _ = env.step(1)
        assert observation[step].any()
        assert terminated == (step == 9)
        assert not truncated
    assert reward in {-1.0, 1.0}
    observation, _ = env.reset()
    assert observation[0].sum() == 1.0


def test_a_truncated_episode_says_so() -> None:
    env = PoolEnv(make_pool(truncate_after=2))
    env.reset()
    assert env.step(0)[2:4] == (False, False)
    observation, reward, terminated, truncated, _ = env.step(0)
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert observation[2].sum() == 1.0


def test_calls_out_of_turn_are_refused() -> None:
    env = PoolEnv(make_pool(truncate_after=1))
    with pytest.raises(RuntimeError, match="reset comes before"):
        env.step(0)
    env.reset()
    with pytest.raises(RuntimeError, match="has not ended"):
        env.reset()
    env.step(0)
    with pytest.raises(RuntimeError, match="reset comes before"):
        env.step(0)
    with pytest.raises(ValueError, match="seed"):
        env.reset(seed=1)


class LifeLost(InlinePool):
    """Says of every step that it lost a life."""

    def receive(self, timeout_s: float) -> EnvStep | None:
        step = super().receive(timeout_s)
        assert step is not None
        if step.reset.any():
            return step
        return step._replace(terminated=np.ones_like(step.terminated))


def test_after_a_lost_life_reset_shows_the_present_observation() -> None:
    env = CATCH.make("catch", CatchConfig(), num_envs=1, batch_size=1, threads=1, seed=0)
    single = PoolEnv(LifeLost(env, batch_size=1))
    single.reset()
    observation, _, terminated, _, _ = single.step(2)
    assert terminated
    np.testing.assert_array_equal(single.reset()[0], observation)
    assert observation[1].any()


class Silent(InlinePool):
    def receive(self, timeout_s: float) -> EnvStep | None:
        return None


def test_a_silent_pool_is_named() -> None:
    env = CATCH.make("catch", CatchConfig(), num_envs=1, batch_size=1, threads=1, seed=0)
    with pytest.raises(DeadlineExceeded, match="gave no step"):
        PoolEnv(Silent(env, batch_size=1)).reset()


def test_it_takes_one_environment() -> None:
    with pytest.raises(ConfigError, match="pool of 1"):
        PoolEnv(make_pool(num_envs=2))
