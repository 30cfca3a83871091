"""What every pool promises the server."""

import contextlib
import gc
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace import catalog
from headrace.envs.device import Moved, State
from headrace.errors import ConfigError, PeerLost
from headrace.pools.base import Pool
from headrace.pools.device import DevicePool
from headrace.pools.grpc import GrpcPool
from headrace.pools.inline import InlinePool
from headrace.pools.native import NativePool
from headrace.pools.settings import WorkerConfig
from headrace.pools.shm import ShmPool, WorkerEnvs
from headrace.run.host import HostConfig, run_host
from headrace.steps import EnvStep
from headrace.transport.settings import LinkConfig, RemoteConfig

NUM_ENVS, BATCH = 4, 2
CASES = [
    ("native", "ALE/Pong-v5"),
    ("inline", "catch"),
    ("inline", "recall"),
    ("inline", "worker_envs:ECHO"),
    ("inline", "counters:held"),
    ("inline", "counters:of_two"),
    ("inline", "counters:reset_by_us"),
    ("device", "catch"),
    ("device", "recall"),
    ("shm", "catch"),
    ("shm", "worker_envs:ECHO"),
    ("shm", "counters:held"),
    ("shm", "counters:reset_by_us"),
    ("grpc", "catch"),
    ("grpc", "worker_envs:ECHO"),
    ("grpc", "counters:held"),
    ("grpc", "counters:of_two"),
]
ELSEWHERE = ("shm", "grpc")  # kinds whose environments are not in the test's hands
WORKERS = WorkerConfig(num_workers=2, batch_wait_ms=5000.0)
# Columns of what Echo shows; the module is not on the path when this one is collected.
COUNT, ACTION = 1, 2
CUT = 3  # steps of an episode of `worker_envs:Cut`


def make_pool(kind: str, name: str, tap: Any, *, batch_size: int = BATCH, seed: int = 1) -> Pool:
    if name.startswith("ALE/"):
        pytest.importorskip("ale_py")
    family = catalog.environment_family(name)
    config = family.config_type()
    if kind == "shm":
        spec = family.spec(name, config)
        recipe = WorkerEnvs(env=name, settings={}, spec=spec, num_envs=NUM_ENVS, seed=seed)
        return Heard(ShmPool(recipe, batch_size=batch_size, workers=WORKERS), tap)
    if kind == "device":
        tap.env = family.make_device(name, config, num_envs=NUM_ENVS, seed=seed)
        return DevicePool(TorchTap(tap), batch_size=batch_size)
    if kind == "grpc":
        spec = family.spec(name, config)
        recipe = WorkerEnvs(env=name, settings={}, spec=spec, num_envs=NUM_ENVS, seed=seed)
        remote = RemoteConfig(host_timeout_s=20.0)
        return Hosted(GrpcPool(recipe, batch_size=batch_size, remote=remote, workers=WORKERS), tap)
    env = family.make(name, config, num_envs=NUM_ENVS, batch_size=BATCH, threads=2, seed=seed)
    tap.env = env
    if name.startswith("counters:"):
        return InlinePool(tap, batch_size=batch_size, groups=[(0, 2), (2, 4)])
    pool: Pool = {"inline": InlinePool, "native": NativePool}[kind](tap, batch_size=batch_size)
    return pool


class Tap:
    """Stands between a pool and its environments, and notes which action went to which of them."""

    def __init__(self) -> None:
        self.env: Any = None
        self.reached: list[tuple[int, int]] = []
        self._due = np.empty(0, dtype=np.int32)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def reset(self) -> EnvStep:
        return self._seen(self.env.reset())

    def recv(self) -> EnvStep:
        return self._seen(self.env.recv())

    def send(self, action: np.ndarray) -> None:
        self.note(self._due, action)
        self.env.send(action)

    def step(self, env_id: np.ndarray, action: np.ndarray) -> EnvStep:
        self.note(env_id, action)
        step: EnvStep = self.env.step(env_id, action)
        return step

    def note(self, env_id: np.ndarray, action: np.ndarray) -> None:
        self.reached += zip(env_id.tolist(), action.tolist(), strict=True)

    def _seen(self, step: EnvStep) -> EnvStep:
        self._due = step.env_id.copy()
        return step


class TorchTap:
    """The same for environments in torch, of which any may be stepped: their state has names."""

    def __init__(self, tap: Tap) -> None:
        self._tap = tap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tap.env, name)

    def begin(self) -> State:
        return {**self._tap.env.begin(), "env_id": torch.arange(NUM_ENVS)}

    def step(self, state: State, action: torch.Tensor) -> Moved:
        self._tap.note(state["env_id"].numpy(), action.numpy())
        moved: Moved = self._tap.env.step(state, action)
        return moved

    def restart(self, state: State, ended: torch.Tensor) -> State:
        return {**self._tap.env.restart(state, ended), "env_id": state["env_id"]}


class Heard:
    """A pool whose environments live elsewhere: they tell by what they show what reached them."""

    def __init__(self, pool: Any, tap: Tap) -> None:
        self._pool = pool
        self._tap = tap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def receive(self, timeout_s: float) -> EnvStep | None:
        step = self._pool.receive(timeout_s)
        if step is not None and self._pool.spec.name == "worker_envs:ECHO":
            stepped = step.observation[:, COUNT] > 0
            self._tap.note(step.env_id[stepped], step.observation[stepped, ACTION].astype(np.int64))
        return step


class Hosted(Heard):
    """A pool with two real worker hosts over loopback, a thread each, which it takes with it."""

    def __init__(self, pool: GrpcPool, tap: Tap) -> None:
        super().__init__(pool, tap)
        self._over = threading.Event()
        self._hosts = [
            threading.Thread(target=self._host, args=(pool.address,))
            for _ in range(NUM_ENVS // BATCH)
        ]
        for host in self._hosts:
            host.start()

    def _host(self, address: str) -> None:
        with contextlib.suppress(ConfigError):  # it may come when all is over
            run_host(
                LinkConfig(connect=address),
                HostConfig(envs=BATCH, trust_code=True),
                stop=self._over.is_set,
                on_message=lambda _: None,
                in_process=True,
            )

    def close(self) -> None:
        self._pool.close()
        self._over.set()  # for those that had not come yet
        for host in self._hosts:
            host.join(20.0)
            assert not host.is_alive()


NET = [
    pytest.param(case, id="-".join(case), marks=[pytest.mark.net] if case[0] == "grpc" else [])
    for case in CASES
]


@pytest.fixture(params=NET)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    kind, name = request.param
    return kind, name


@pytest.fixture
def tap() -> Tap:
    return Tap()


@pytest.fixture
def pool(case: tuple[str, str], tap: Tap) -> Iterator[Pool]:
    pool = make_pool(*case, tap)
    yield pool
    pool.close()


def tells(case: tuple[str, str]) -> bool:
    """Whether the tap can tell what reached the environments."""
    return case[0] not in ELSEWHERE or case[1] == "worker_envs:ECHO"


def by_environment(pairs: list[tuple[int, int]]) -> dict[int, list[int]]:
    actions = defaultdict(list)
    for env_id, action in pairs:
        actions[env_id].append(action)
    return actions


def receive(pool: Pool) -> EnvStep:
    step = pool.receive(120.0)  # hosts take long to start on a busy machine
    assert step is not None
    return step


def play(pool: Pool, rounds: int, choose: Callable[[EnvStep], np.ndarray]) -> list[EnvStep]:
    steps = []
    for _ in range(rounds):
        step = receive(pool)
        steps.append(step)
        pool.reply(choose(step))
    return steps


def test_every_action_reaches_its_environment(pool: Pool, tap: Tap, case: tuple[str, str]) -> None:
    if not tells(case):
        pytest.skip("these do not show what reached them")
    rng = np.random.default_rng(0)
    sent = []

    def choose(step: EnvStep) -> np.ndarray:
        action = rng.integers(0, pool.spec.num_actions, len(step.env_id))
        sent.extend(zip(step.env_id.tolist(), action.tolist(), strict=True))
        return action

    play(pool, 30, choose)
    holds = case[1] in ("counters:held", "counters:of_two")  # rows of episodes that ended
    assert 30 <= len(sent) < 30 * BATCH if holds else len(sent) == 30 * BATCH
    reached = by_environment(tap.reached)
    for env_id, actions in by_environment(sent).items():
        # What shows its last action shows it one row later.
        missing = len(actions) - len(reached[env_id])
        assert 0 <= missing <= (case[0] in ELSEWHERE)
        assert reached[env_id] == actions[: len(reached[env_id])]


def test_first_row_of_each_environment_and_no_other_is_a_fresh_reset(pool: Pool) -> None:
    seen: set[int] = set()
    # The start of an emulator takes as long as many steps of those that are there already.
    for _ in range(30_000):
        if len(seen) == NUM_ENVS:
            break
        step = receive(pool)
        first = np.array([env_id not in seen for env_id in step.env_id.tolist()])
        assert step.reset[first].all()
        assert not (step.terminated | step.truncated)[first].any()
        later = step.reset & ~first
        assert (step.terminated | step.truncated)[later].all()
        seen.update(step.env_id.tolist())
        # Last: the arrays are the pool's again after the reply.
        pool.reply(np.zeros(len(step.env_id), dtype=np.int64))
    assert seen == set(range(NUM_ENVS))


def test_nobody_is_left_out_once_all_have_started(pool: Pool) -> None:
    played = {env_id: 0 for env_id in range(NUM_ENVS)}
    for _ in range(30_000):
        if min(played.values()) >= 20:
            break
        step = receive(pool)
        pool.reply(np.zeros(len(step.env_id), dtype=np.int64))
        for env_id in step.env_id.tolist():
            played[env_id] += 1
    assert min(played.values()) >= 20


def test_rows_fit_the_record(pool: Pool) -> None:
    def checked(step: EnvStep) -> np.ndarray:
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
        return np.zeros(rows, dtype=np.int64)

    play(pool, 10, checked)


@pytest.mark.parametrize("kind", ["inline", "shm", pytest.param("grpc", marks=pytest.mark.net)])
def test_the_mask_of_a_final_observation_comes_with_it(kind: str, tap: Tap) -> None:
    pool = make_pool(kind, "worker_envs:Cut", tap)

    ended = 0

    def allowed(step: EnvStep) -> np.ndarray:
        nonlocal ended
        assert step.action_mask is not None
        if step.truncated.any():
            cut = step.truncated
            assert step.final_observation is not None
            assert step.final_action_mask is not None
            assert (step.final_observation[cut] == CUT).all()
            assert (step.final_action_mask[cut] == (np.arange(4) == CUT)).all()
            ended += int(cut.sum())
        else:
            assert step.final_action_mask is None
        return step.action_mask.argmax(axis=1)

    try:
        play(pool, 30, allowed)
    finally:
        pool.close()
    assert ended > 10


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
    pool: Pool,
    tap: Tap,
    case: tuple[str, str],
    spoil: Callable[[np.ndarray, int], np.ndarray],
) -> None:
    if not tells(case):
        pytest.skip("these do not show what reached them")
    action = np.zeros(BATCH, dtype=np.int64)
    first = receive(pool)
    with pytest.raises(ValueError, match="actions"):
        pool.reply(spoil(action, pool.spec.num_actions))
    assert tap.reached == []
    pool.reply(action)
    if case[0] not in ELSEWHERE:
        receive(pool)
        assert len(tap.reached) == BATCH
        return
    answered = np.zeros(NUM_ENVS)
    answered[first.env_id] += 1
    for _ in range(4):  # each has made as many steps as it got good answers
        step = receive(pool)
        np.testing.assert_array_equal(step.observation[:, COUNT], answered[step.env_id])
        pool.reply(action)
        answered[step.env_id] += 1


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


def test_a_batch_size_that_cannot_be_is_refused(case: tuple[str, str], tap: Tap) -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        make_pool(*case, tap, batch_size=NUM_ENVS + 1)


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def shared_blocks() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:headrace")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("started", [False, True])
def test_nothing_is_left_behind(case: tuple[str, str], tap: Tap, started: bool) -> None:
    gc.collect()
    fds, blocks = open_fds(), shared_blocks()
    pool = make_pool(*case, tap)
    if started:
        play(pool, 5, lambda step: np.zeros(len(step.env_id), dtype=np.int64))
    pids = getattr(pool, "worker_pids", [])
    assert len(pids) == (2 if case[0] == "shm" else 0)
    pool.close()
    del pool
    gc.collect()
    assert open_fds() <= fds
    assert shared_blocks() == blocks
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
