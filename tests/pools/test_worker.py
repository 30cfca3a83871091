"""The worker's loop and what it prints, without a process."""

import dataclasses
import io
import json
from collections.abc import Callable
from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest

from headrace import catalog
from headrace.errors import ConfigError, PeerLost
from headrace.pools.processes import WorkerEnd
from headrace.pools.shm_layout import GROUP, RECORD, Table, layout
from headrace.run import worker
from headrace.run.worker import (
    TOGETHER_S,
    Group,
    Hosted,
    NamedOutput,
    generation_seed,
    make_hosted,
    run_worker,
)
from headrace.specs import EnvSpec
from headrace.transport.messages import describe, ensure_same_spec

ENV = "worker_envs:ECHO"


class Orders:
    """The parent's orders, one after the other, and what the worker said."""

    def __init__(self, *orders: bytes) -> None:
        self._orders = list(orders)
        self.said: list[Any] = []

    def receive(self) -> bytes:
        if not self._orders:
            raise PeerLost("the parent is gone")
        return self._orders.pop(0)

    def status(self, message: Any) -> None:
        self.said.append(message)


class Clock:
    """Seconds that pass only in environments."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


class Env:
    """Environments of Echo with what the adapters of Gymnasium have besides."""

    def __init__(self, env: Any, clock: Clock, cost_s: float = 0.0) -> None:
        self._env = env
        self._clock, self._cost_s = clock, cost_s
        self.num_envs = env.num_envs
        self.notices = ["known before"]
        self.current_env: int | None = None
        self.stepped: list[list[int]] = []
        self.closed = False

    def reset(self) -> Any:
        return self._env.reset()

    def step(self, env_id: np.ndarray, action: np.ndarray) -> Any:
        if len(self.notices) == 1:
            self.notices.append("its reward is odd")
        self.stepped.append(env_id.tolist())
        self._clock.now_s += self._cost_s * len(env_id)
        return self._env.step(env_id, action)

    def close(self) -> None:
        self.closed = True


Work = Callable[..., tuple[Env, Table, list[list[tuple[int, ...]]]]]


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    """Runs a worker of three groups of two; returns what it did, and what it wrote at a time."""

    def run(orders: Orders, cost_s: float = 0.0) -> Any:
        clock, written = Clock(), []
        monkeypatch.setattr(worker, "time", clock)
        monkeypatch.setattr(worker.os, "write", lambda _, data: written.append(data))
        family = catalog.environment_family(ENV)
        config = family.config_type()
        plan = layout(family.spec(ENV, config), 8)
        table = Table(bytearray(plan.nbytes), plan)
        table.all.action[:] = np.arange(8)
        made = family.make(ENV, config, num_envs=6, batch_size=6, threads=1, seed=0, first_env=2)
        env = Env(made, clock, cost_s)
        groups = [Group(2 * n, 2 * n + 2, RECORD.pack(1, n, 9)) for n in range(3)]
        hosted = Hosted(cast(Any, env), table.rows(2, 8), groups)
        run_worker(cast(WorkerEnd, orders), hosted, ready_fd=-1, run_offset=5)
        return env, table, [list(RECORD.iter_unpack(data)) for data in written]

    return run


def packed(*groups: int) -> bytes:
    return b"".join(GROUP.pack(group) for group in groups)


def records(*groups: int) -> list[tuple[int, ...]]:
    return [(1, group, 9) for group in groups]


def test_it_steps_the_groups_that_it_is_told_in_that_order(work: Work) -> None:
    env, table, written = work(Orders(packed(1), packed(1, 0)))
    assert env.stepped == [[2, 3], [2, 3], [0, 1]]
    assert written == [records(0, 1, 2), records(1), records(1), records(0)]
    assert table.all.observation[:, 1].tolist() == [0, 0, 1, 1, 2, 2, 0, 0]
    assert table.all.observation[2:6, 2].tolist() == [2, 3, 4, 5]
    assert table.all.run_id.tolist() == [0, 0, 5, 5, 5, 5, 5, 5]
    assert env.closed


def test_groups_that_cost_little_are_stepped_as_one(work: Work) -> None:
    orders = [packed(0), packed(0, 1, 2), packed(1, 2), packed(0, 2), packed(2, 1)]
    env, table, written = work(Orders(*orders), TOGETHER_S / 7)
    assert env.stepped == [[0, 1], [0, 1, 2, 3, 4, 5], [2, 3, 4, 5], [0, 1], [4, 5], [4, 5], [2, 3]]
    assert written[1:4] == [records(0), records(0, 1, 2), records(1, 2)]
    assert written[4:] == [records(0), records(2), records(2), records(1)]
    assert table.all.observation[2:, 1].tolist() == [3, 3, 3, 3, 4, 4]
    assert table.all.observation[2:, 2].tolist() == [2, 3, 4, 5, 6, 7]


def test_of_dear_ones_none_waits_for_the_next(work: Work) -> None:
    env, _, written = work(Orders(packed(0, 1, 2), packed(0, 1, 2)), TOGETHER_S / 3)
    assert env.stepped == [[0, 1], [2, 3], [4, 5]] * 2
    assert written[1:] == [records(0), records(1), records(2)] * 2


def test_news_of_the_environments_is_passed_on_once(work: Work) -> None:
    orders = Orders(*[packed(0)] * 4)
    work(orders)
    assert orders.said == [{"note": "its reward is odd"}]


def test_another_spec_in_the_worker_is_refused() -> None:
    settings = {
        "env": ENV,
        "settings": {"shape": [5]},  # JSON has no tuples
        "seed": 0,
        "num_envs": 2,
        "groups": [[0, 2]],
        "worker": 0,
        "generation": 0,
        "block_fd": -1,
        "nbytes": 64,
    }
    with pytest.raises(ConfigError, match="another spec"):
        make_hosted(settings)


def test_a_spec_of_as_many_bytes_that_is_another_one_is_refused() -> None:
    """Bounds and counts of choices take no bytes."""
    spec = EnvSpec(
        name=ENV,
        observation_space=gym.spaces.Box(0.0, 1.0, (5,), np.float32),
        action_space=gym.spaces.Discrete(4),
    )
    ensure_same_spec(spec, json.loads(json.dumps(describe(spec))))
    for change, what in (
        ({"action_space": gym.spaces.Discrete(5)}, "action is 5 choices from 0 here and 4 choices"),
        (
            {"observation_space": gym.spaces.Box(0.0, 2.0, (5,), np.float32)},
            r"observation is float32 \[5\] in 0..2 .* here and float32 \[5\] in 0..1",
        ),
        ({"name": "other"}, "environment is other here"),
        ({"frame_stack": 4}, "frame_stack is 4 here and 1 in its parent"),
    ):
        with pytest.raises(ConfigError, match=what):
            ensure_same_spec(dataclasses.replace(spec, **change), describe(spec))


def test_a_later_start_has_another_seed() -> None:
    seeds = [generation_seed(7, generation) for generation in range(4)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 4


def test_what_is_printed_names_the_environment_where_that_is_known() -> None:
    bare, gymnasium = Env(catalog_env(), Clock()), Env(catalog_env(), Clock())
    output = io.BytesIO()
    stream = NamedOutput(io.TextIOWrapper(output), cast(Any, [bare, gymnasium]))
    stream.write("starting\n")
    gymnasium.current_env = 17
    stream.write("one, ")
    stream.write("two\nthree\n")
    gymnasium.current_env = None
    stream.write("done\n")
    stream.flush()
    assert output.getvalue().decode().splitlines() == [
        "starting",
        "environment 17: one, two",
        "environment 17: three",
        "done",
    ]


def catalog_env() -> Any:
    family = catalog.environment_family(ENV)
    config = family.config_type()
    return family.make(ENV, config, num_envs=1, batch_size=1, threads=1, seed=0)
