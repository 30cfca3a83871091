"""What every pool promises the server."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from headrace import catalog
from headrace.errors import ConfigError, PeerLost
from headrace.pools.base import Pool
from headrace.steps import EnvStep

NUM_ENVS, BATCH = 4, 2
NAMES = ["ALE/Pong-v5", "catch", "recall"]


def make_env(name: str, *, num_envs: int = NUM_ENVS, batch_size: int = BATCH, seed: int = 1) -> Any:
    if name.startswith("ALE/"):
        pytest.importorskip("ale_py")
    family = catalog.environment_family(name)
    return family.make(
        name, family.config_type(), num_envs=num_envs, batch_size=batch_size, threads=2, seed=seed
    )


def make_pool(name: str, env: Any) -> Pool:
    kind = catalog.environment_family(name).pool
    pool: Pool = catalog.resolve("pool", catalog.POOLS, kind)(env, batch_size=BATCH)
    return pool


class Tap:
    """Stands between a pool and its environments, and notes which action went to which of them."""

    def __init__(self, env: Any) -> None:
        self._env = env
        self.reached: list[tuple[int, int]] = []
        self._due = np.empty(0, dtype=np.int32)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def reset(self) -> EnvStep:
        return self._seen(self._env.reset())

    def recv(self) -> EnvStep:
        return self._seen(self._env.recv())

    def send(self, action: np.ndarray) -> None:
        self._note(self._due, action)
        self._env.send(action)

    def step(self, env_id: np.ndarray, action: np.ndarray) -> EnvStep:
        self._note(env_id, action)
        step: EnvStep = self._env.step(env_id, action)
        return step

    def _seen(self, step: EnvStep) -> EnvStep:
        self._due = step.env_id.copy()
        return step

    def _note(self, env_id: np.ndarray, action: np.ndarray) -> None:
        self.reached += zip(env_id.tolist(), action.tolist(), strict=True)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tap(name: str) -> Tap:
    return Tap(make_env(name))


@pytest.fixture
def pool(name: str, tap: Tap) -> Pool:
    return make_pool(name, tap)


def receive(pool: Pool) -> EnvStep:
    step = pool.receive(30.0)
    assert step is not None
    return step


def play(pool: Pool, rounds: int, choose: Callable[[EnvStep], np.ndarray]) -> list[EnvStep]:
    steps = []
    for _ in range(rounds):
        step = receive(pool)
        steps.append(step)
        pool.reply(choose(step))
    return steps


def test_every_action_reaches_its_environment(pool: Pool, tap: Tap) -> None:
    rng = np.random.default_rng(0)
    sent = []

    def choose(step: EnvStep) -> np.ndarray:
        action = rng.integers(0, pool.spec.num_actions, len(step.env_id))
        sent.extend(zip(step.env_id.tolist(), action.tolist(), strict=True))
        return action

    play(pool, 30, choose)
    assert len(sent) == 30 * BATCH
    assert tap.reached == sent


def test_first_row_of_each_environment_and_no_other_is_a_fresh_reset(pool: Pool) -> None:
    seen: set[int] = set()
    # The start of an emulator takes as long as many steps of those that are there already.
    for _ in range(3000):
        if len(seen) == NUM_ENVS:
            break
        step = receive(pool)
        pool.reply(np.zeros(len(step.env_id), dtype=np.int64))
        first = np.array([env_id not in seen for env_id in step.env_id.tolist()])
        assert step.reset[first].all()
        assert not (step.terminated | step.truncated)[first].any()
        later = step.reset & ~first
        assert (step.terminated | step.truncated)[later].all()
        seen.update(step.env_id.tolist())
    assert seen == set(range(NUM_ENVS))


def test_nobody_is_left_out_once_all_have_started(pool: Pool) -> None:
    played = {env_id: 0 for env_id in range(NUM_ENVS)}
    for _ in range(3000):
        if min(played.values()) >= 20:
            break
        step = receive(pool)
        pool.reply(np.zeros(len(step.env_id), dtype=np.int64))
        for env_id in step.env_id.tolist():
            played[env_id] += 1
    assert min(played.values()) >= 20


def test_rows_fit_the_record(pool: Pool) -> None:
    for step in play(pool, 10, lambda step: np.zeros(len(step.env_id), dtype=np.int64)):
        rows = len(step.env_id)
        assert 0 < rows <= pool.max_batch == BATCH
        assert len(set(step.env_id.tolist())) == rows
        assert (step.env_id.dtype, step.run_id.dtype) == (np.int32, np.int64)
        assert step.observation.shape == (rows, *pool.spec.observation_space.shape)
        assert step.observation.dtype == pool.spec.observation_space.dtype
        assert (step.reward.dtype, step.reward.shape) == (np.float32, (rows,))
        for flag in (step.reset, step.terminated, step.truncated):
            assert (flag.dtype, flag.shape) == (np.bool_, (rows,))
        assert not (step.terminated & step.truncated).any()


def test_receive_and_reply_alternate(pool: Pool) -> None:
    action = np.zeros(BATCH, dtype=np.int64)
    with pytest.raises(RuntimeError, match="receive a batch first"):
        pool.reply(action)
    receive(pool)
    with pytest.raises(RuntimeError, match="reply to the last batch first"):
        pool.receive(0.0)
    pool.reply(action)
    with pytest.raises(RuntimeError, match="receive a batch first"):
        pool.reply(action)
    receive(pool)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda action, num_actions: np.where(np.arange(BATCH) == 1, num_actions, action),
        lambda action, num_actions: np.where(np.arange(BATCH) == 0, -1, action),
        lambda action, num_actions: action[:-1],
        lambda action, num_actions: action[:, None],
        lambda action, num_actions: action.astype(np.float32),
    ],
    ids=["above", "below", "too few", "column", "float"],
)
def test_a_wrong_reply_is_refused_before_anything_steps(
    pool: Pool, tap: Tap, spoil: Callable[[np.ndarray, int], np.ndarray]
) -> None:
    action = np.zeros(BATCH, dtype=np.int64)
    receive(pool)
    with pytest.raises(ValueError, match="actions"):
        pool.reply(spoil(action, pool.spec.num_actions))
    assert tap.reached == []
    pool.reply(action)
    receive(pool)
    assert len(tap.reached) == BATCH


def test_a_received_batch_stays_as_it_was_until_the_reply(pool: Pool) -> None:
    play(pool, 8, lambda step: np.zeros(len(step.env_id), dtype=np.int64))
    step = receive(pool)
    before = [value.copy() for value in (step.env_id, step.observation, step.reward, step.reset)]
    time.sleep(0.05)  # threads of a native pool go on with the other environments
    after = (step.env_id, step.observation, step.reward, step.reset)
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


def test_close_is_final_and_may_come_twice(pool: Pool) -> None:
    receive(pool)
    pool.close()
    pool.close()
    with pytest.raises(PeerLost):
        pool.receive(0.0)
    with pytest.raises(PeerLost):
        pool.reply(np.zeros(BATCH, dtype=np.int64))


def test_a_batch_size_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        catalog.resolve("pool", catalog.POOLS, catalog.environment_family(name).pool)(
            make_env(name), batch_size=NUM_ENVS + 1
        )
