"""The inline pool: everyone is served, in order, and a saved pool goes on bit for bit."""

from typing import Any

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


def test_it_can_be_saved_where_the_environments_can() -> None:
    pool = make_pool("catch")
    assert isinstance(pool, Restorable)
    assert pool.restorable
    echo = make_echo()
    assert not echo.restorable
    with pytest.raises(RuntimeError, match="cannot be saved"):
        echo.snapshot()


def make_echo(env_type: Any = None) -> InlinePool:
    family = catalog.environment_family("worker_envs:ECHO")
    config = family.config_type(mask=True)
    env = family.make("worker_envs:ECHO", config, num_envs=3, batch_size=2, threads=1, seed=0)
    return InlinePool(env if env_type is None else env_type(env), batch_size=2)


def test_masks_and_infos_ride_with_their_rows() -> None:
    infos = 0
    for step in play(make_echo(), 40, seed=0):
        count = step.observation[:, 1]
        assert step.action_mask is not None
        np.testing.assert_array_equal(step.action_mask, (np.arange(4) + count[:, None]) % 2 == 0)
        ended = np.flatnonzero(step.terminated | step.truncated).tolist()
        expected = {row: {"count": float(count[row])} for row in ended}
        assert step.episode_info == (expected or None)
        infos += len(ended)
    assert infos > 10


class Saved:
    """Echo that can be saved."""

    def __init__(self, env: Any) -> None:
        self._env = env

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def snapshot(self) -> dict[str, Any]:
        return {"count": self._env._count.copy()}

    def restore(self, state: dict[str, Any]) -> None:
        self._env._count[:] = state["count"]


def test_infos_that_wait_are_saved() -> None:
    pool, twin = make_echo(Saved), make_echo(Saved)
    for _ in range(20):
        play(pool, 1, seed=0)
        twin.restore(pool.snapshot())
        row = pool.receive(0.0)
        other = twin.receive(0.0)
        assert row is not None
        assert other is not None
        assert row.episode_info == other.episode_info
        pool.reply(np.zeros(len(row.env_id), dtype=np.int64))
        twin.reply(np.zeros(len(row.env_id), dtype=np.int64))
