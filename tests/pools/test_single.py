"""One environment of a pool as a Gymnasium environment."""

import importlib
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from headrace.envs.catch import CATCH, CatchConfig
from headrace.envs.gymnasium_batch import GymnasiumBatch
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


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Dict with text, forbidden actions, and numbers at the end."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "run"))
    return importlib.import_module("nested_env").Guarded


def assert_shown(found: Any, own: Any) -> None:
    assert list(found) == ["camera", "inner", "place"]  # Gymnasium sorts, and "hint" is text
    assert type(found["place"]) is int
    assert found["place"] == own["place"]
    assert type(found["inner"]) is tuple
    numbers, pair, inner = found["inner"]
    assert numbers.dtype == np.float64
    np.testing.assert_array_equal(numbers, np.float32(own["inner"][0]))
    np.testing.assert_array_equal(pair, own["inner"][1])
    np.testing.assert_array_equal(inner["flags"], own["inner"][2]["flags"])
    np.testing.assert_array_equal(found["camera"], own["camera"])


def test_it_shows_what_the_environment_itself_shows(guarded: Any) -> None:
    env = PoolEnv(InlinePool(GymnasiumBatch([guarded()], name="guarded", seed=7), batch_size=1))
    assert isinstance(env.observation_space, gym.spaces.Dict)
    twin, rng = guarded(), np.random.default_rng(0)
    seed: int | None = int(np.random.SeedSequence(7).generate_state(1)[0] >> 1)
    ends = set()
    for _ in range(8):
        own, own_info = twin.reset(seed=seed)
        seed = None
        observation, info = env.reset()
        assert set(info) == {"action_mask"}
        over = False
        while not over:
            assert env.observation_space.contains(observation)
            assert_shown(observation, own)
            np.testing.assert_array_equal(info["action_mask"], own_info["action_mask"])
            assert info["action_mask"].dtype == np.bool_
            action = int(rng.choice(np.flatnonzero(info["action_mask"])))
            own, own_reward, terminated, truncated, own_info = twin.step(action)
            observation, reward, *flags, info = env.step(action)
            assert reward == own_reward
            assert flags == [terminated, truncated and not terminated]
            over = any(flags)
            ends.add(tuple(flags))
            assert info.get("score") == own_info.get("score")
            assert (info.get("score") is not None) == over
        assert_shown(observation, own)
        assert set(info) == {"action_mask", "score"}
    assert len(ends) == 3, "an end of each kind must have been met"


def test_an_end_has_its_own_mask_and_reset_that_of_the_next_episode(guarded: Any) -> None:
    env = PoolEnv(InlinePool(GymnasiumBatch([guarded()], name="guarded", seed=7), batch_size=1))
    _, info = env.reset()
    kept: list[Any] = []
    for _ in range(6):
        kept.append((info["action_mask"], info["action_mask"].copy()))
        *_, info = env.step(int(np.flatnonzero(info["action_mask"])[0]))
    assert env._held is not None
    following = env._held[1]["action_mask"].copy()
    assert (info["action_mask"] != following).any()
    info["action_mask"][:] = True  # what is held is no part of what was handed out
    np.testing.assert_array_equal(env.reset()[1]["action_mask"], following)
    for mask, then in kept:
        np.testing.assert_array_equal(mask, then)


def test_where_every_action_is_allowed_infos_are_empty() -> None:
    env = PoolEnv(make_pool())
    assert env.reset()[1] == {}
    assert env.step(1)[4] == {}
