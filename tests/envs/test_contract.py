"""What every environment promises its pool."""

from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import Any

import numpy as np
import pytest

from headrace import catalog
from headrace.errors import ConfigError
from headrace.pools.base import Pool
from headrace.steps import EnvStep

NAMES = ["ALE/Pong-v5", "CartPole-v1", "catch", "recall"]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    if str(request.param).startswith("ALE/"):
        pytest.importorskip("ale_py")
    return str(request.param)


def make_pool(
    name: str, *, num_envs: int, seed: int, config: Any = None, first_env: int = 0
) -> Pool:
    family = catalog.environment_family(name)
    settings = config or family.config_type()
    env = family.make(
        name,
        settings,
        num_envs=num_envs,
        batch_size=num_envs,
        threads=2,
        seed=seed,
        first_env=first_env,
    )
    kind = "inline" if family.pool == "shm" else family.pool
    pool: Pool = catalog.resolve("pool", catalog.POOLS, kind)(env, batch_size=num_envs)
    return pool


def play(pool: Pool, rounds: int, seed: int = 0) -> list[EnvStep]:
    rng = np.random.default_rng(seed)
    steps = []
    for _ in range(rounds):
        step = pool.receive(30.0)
        assert step is not None
        steps.append(step)
        pool.reply(rng.integers(0, pool.spec.num_actions, len(step.env_id)))
    return steps


def test_the_spec_needs_no_environment_and_is_that_of_the_environment(name: str) -> None:
    family = catalog.environment_family(name)
    spec = family.spec(name, family.config_type())
    pool = make_pool(name, num_envs=1, seed=0)
    assert spec == pool.spec
    assert spec.name == name


def test_observations_lie_in_the_space(name: str) -> None:
    pool = make_pool(name, num_envs=2, seed=0)
    space = pool.spec.observation_space
    for step in play(pool, 40):
        assert all(space.contains(observation) for observation in step.observation)
        if step.final_observation is not None:
            ended = step.reset & (step.terminated | step.truncated)
            assert all(space.contains(final) for final in step.final_observation[ended])


def test_flags_agree(name: str) -> None:
    first, *later = play(make_pool(name, num_envs=2, seed=0), 40)
    assert first.reset.all()
    assert not first.reward.any()
    for step in later:
        assert not (step.terminated & step.truncated).any()
        assert (step.terminated | step.truncated)[step.reset].all()
        assert step.reset[step.truncated].all()


def test_one_seed_gives_one_run_and_another_seed_another(name: str) -> None:
    one, same, other = (play(make_pool(name, num_envs=2, seed=seed), 60) for seed in (1, 1, 2))

    def looks(steps: list[EnvStep]) -> np.ndarray:
        return np.stack([step.observation for step in steps])

    np.testing.assert_array_equal(looks(one), looks(same))
    assert (looks(one) != looks(other)).any()


def test_copies_differ(name: str) -> None:
    pool = make_pool(name, num_envs=2, seed=0)
    looks = []
    for _ in range(60):
        step = pool.receive(30.0)
        assert step is not None
        looks.append(step.observation)
        pool.reply(np.zeros(2, dtype=np.int64))
    run = np.stack(looks, axis=1)
    assert any((run[0] != other).any() for other in run[1:])


def test_a_copy_goes_its_way_wherever_it_runs(name: str) -> None:
    """Copy 2 of three, and the first copy of a pool that begins at 2."""

    def run(row: int, **settings: int) -> np.ndarray:
        pool = make_pool(name, seed=4, **settings)
        looks = []
        for _ in range(60):
            step = pool.receive(30.0)
            assert step is not None
            (at,) = np.flatnonzero(step.env_id == row)
            looks.append(step.observation[at].copy())
            pool.reply(np.ones(len(step.env_id), dtype=np.int64))
        return np.stack(looks)

    among_others = run(2, num_envs=3)
    np.testing.assert_array_equal(run(0, num_envs=1, first_env=2), among_others)
    assert (run(0, num_envs=1) != among_others).any()


def test_every_setting_is_frozen_and_explained(name: str) -> None:
    family = catalog.environment_family(name)
    config = family.config_type()
    assert is_dataclass(config)
    with pytest.raises(FrozenInstanceError):
        setattr(config, fields(config)[0].name, 1)
    assert isinstance(family.evaluation(config), family.config_type)


@pytest.mark.parametrize("wrong", ["ALE/Nonesuch-v5", "Catch", "recal"])
def test_an_unknown_name_is_refused(name: str, wrong: str) -> None:
    family = catalog.environment_family(name)
    with pytest.raises(ConfigError, match="named"):
        family.spec(wrong, family.config_type())
