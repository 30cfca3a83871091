"""The worker's loop and what it prints, without a process."""

import io
import os
from typing import Any, cast

import numpy as np
import pytest

from headrace import catalog
from headrace.errors import ConfigError, PeerLost
from headrace.pools.processes import WorkerEnd
from headrace.pools.shm_layout import GROUP, RECORD, Table, layout
from headrace.run.worker import Group, NamedOutput, generation_seed, make_groups, run_worker

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


class Env:
    """One environment of Echo with what the adapters of Gymnasium have besides."""

    def __init__(self, env: Any) -> None:
        self._env = env
        self.num_envs = env.num_envs
        self.notices = ["known before"]
        self.current_env: int | None = None
        self.closed = False

    def reset(self) -> Any:
        return self._env.reset()

    def step(self, env_id: np.ndarray, action: np.ndarray) -> Any:
        if len(self.notices) == 1:
            self.notices.append("its reward is odd")
        return self._env.step(env_id, action)

    def close(self) -> None:
        self.closed = True


def work(orders: Orders) -> tuple[list[Env], Table, list[tuple[int, ...]]]:
    family = catalog.environment_family(ENV)
    config = family.config_type()
    plan = layout(family.spec(ENV, config), 4)
    table = Table(bytearray(plan.nbytes), plan)
    table.all.action[:] = [0, 1, 2, 3]
    envs, groups = [], []
    for number, first in enumerate((0, 2)):
        made = family.make(
            ENV, config, num_envs=2, batch_size=2, threads=1, seed=0, first_env=first
        )
        envs.append(Env(made))
        record = RECORD.pack(1, number, 9)
        groups.append(
            Group(cast(Any, envs[-1]), table.rows(first, first + 2), record, envs[-1].notices)
        )
    ready, ready_end = os.pipe()
    run_worker(cast(WorkerEnd, orders), groups, ready_fd=ready_end, run_offset=5)
    records = list(RECORD.iter_unpack(os.read(ready, 1 << 12)))
    os.close(ready)
    os.close(ready_end)
    return envs, table, records


def test_it_steps_the_groups_that_it_is_told_in_that_order() -> None:
    orders = Orders(GROUP.pack(1), GROUP.pack(1) + GROUP.pack(0))
    envs, table, records = work(orders)
    assert records == [(1, 0, 9), (1, 1, 9), (1, 1, 9), (1, 1, 9), (1, 0, 9)]
    assert table.all.observation[:, 1].tolist() == [1.0, 1.0, 2.0, 2.0]
    assert table.all.observation[:, 2].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert table.all.run_id.tolist() == [5] * 4
    assert all(env.closed for env in envs)


def test_news_of_the_environments_is_passed_on_once() -> None:
    orders = Orders(*[GROUP.pack(0)] * 4)
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
        make_groups(settings)


def test_a_later_start_has_another_seed() -> None:
    seeds = [generation_seed(7, generation) for generation in range(4)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 4


def test_what_is_printed_names_the_environment_where_that_is_known() -> None:
    bare, gymnasium = Env(catalog_env()), Env(catalog_env())
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
