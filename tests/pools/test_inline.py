"""The inline pool: everyone is served, in order, and a saved pool goes on bit for bit."""

import numpy as np
import pytest

from headrace import catalog
from headrace.pools.base import Restorable
from headrace.pools.inline import InlinePool
from headrace.steps import EnvStep


def make_pool(name: str, *, seed: int = 3) -> InlinePool:
    family = catalog.environment_family(name)
    config = {"catch": {"truncate_after": 4}, "recall": {"delay_steps": 1}}[name]
    env = family.make(
        name, family.config_type(**config), num_envs=5, batch_size=2, threads=1, seed=seed
    )
    return InlinePool(env, batch_size=2)


def receive(pool: InlinePool) -> EnvStep:
    step = pool.receive(0.0)
    assert step is not None
    return step


def play(pool: InlinePool, rounds: int, seed: int) -> list[EnvStep]:
    rng = np.random.default_rng(seed)
    steps = []
    for _ in range(rounds):
        steps.append(receive(pool))
        pool.reply(rng.integers(0, pool.spec.num_actions, len(steps[-1].env_id)))
    return steps


def assert_same(steps: list[EnvStep], others: list[EnvStep]) -> None:
    for step, other in zip(steps, others, strict=True):
        for name, value in step._asdict().items():
            np.testing.assert_array_equal(value, getattr(other, name), err_msg=name)


def test_environments_take_turns() -> None:
    order = np.concatenate([step.env_id for step in play(make_pool("catch"), 10, seed=0)])
    assert order.tolist() == [0, 1, 2, 3, 4] * 4


@pytest.mark.parametrize("name", ["catch", "recall"])
@pytest.mark.parametrize("lent", [False, True])
def test_a_restored_pool_goes_on_bit_for_bit(name: str, lent: bool) -> None:
    pool = make_pool(name)
    play(pool, 13, seed=0)
    if lent:
        receive(pool)
    state = pool.snapshot()
    twin = make_pool(name, seed=99)
    play(twin, 4, seed=5)
    twin.restore(state)
    if lent:
        pool.restore(state)
    steps = play(pool, 40, seed=1)
    assert any(step.reset.any() for step in steps)
    assert_same(steps, play(twin, 40, seed=1))


def test_a_snapshot_is_a_copy() -> None:
    pool = make_pool("catch")
    play(pool, 5, seed=0)
    state = pool.snapshot()
    before = {name: value.copy() for name, value in state.items()}
    play(pool, 5, seed=1)
    assert state.keys() == before.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_a_final_observation_rides_beside_its_row_only() -> None:
    ended = 0
    for step in play(make_pool("catch"), 60, seed=2):
        over = step.terminated | step.truncated
        assert (step.final_observation is not None) == over.any()
        if step.final_observation is not None:
            assert (step.final_observation[over] != step.observation[over]).any(axis=(1, 2)).all()
            ended += int(over.sum())
    assert ended > 10


def test_it_can_be_saved() -> None:
    assert isinstance(make_pool("catch"), Restorable)
