"""Worker hosts, in threads of the test, at a real pool over loopback."""

import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from headrace import catalog
from headrace.config import from_dict
from headrace.errors import ConfigError, HeadraceError, PeerLost
from headrace.pools.base import Pool
from headrace.pools.grpc import GrpcPool
from headrace.pools.settings import WorkerConfig
from headrace.pools.shm import WorkerEnvs
from headrace.run import host, host_blocks
from headrace.run.api import prepare
from headrace.run.host import HostConfig, read_welcome, run_host
from headrace.run.host_blocks import BlockThread, Granted, RunIds, Task
from headrace.specs import EnvSpec
from headrace.steps import RUN_IDS, EnvStep
from headrace.transport import wire
from headrace.transport.messages import describe, encode_action
from headrace.transport.settings import LinkConfig, RemoteConfig
from headrace.transport.wire import Kind, Message

ENV = "worker_envs:ECHO"
ENV_ID, COUNT, ACTION, SEED = range(4)


@pytest.fixture(autouse=True)
def worker_envs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "pools"))


class Hosts:
    """Worker hosts in threads, what they said, and what they died of."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.errors: list[BaseException] = []
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, pool: GrpcPool, **config: Any) -> threading.Thread:
        """Starts a host; returns its thread."""
        settings = HostConfig(**({"trust_code": True} | config))
        thread = threading.Thread(target=self._run, args=(pool.address, settings))
        self._threads.append(thread)
        thread.start()
        return thread

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(20.0)
            assert not thread.is_alive()

    def _run(self, address: str, config: HostConfig) -> None:
        try:
            run_host(
                LinkConfig(connect=address),
                config,
                stop=self._stop.is_set,
                on_message=self.said.append,
                in_process=True,
            )
        except HeadraceError as error:
            self.errors.append(error)
        except ValueError as error:  # of the environments
            self.errors.append(error)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    hosts = Hosts()
    yield hosts
    hosts.end()


Make = Callable[..., GrpcPool]


@pytest.fixture
def make(hosts: Hosts) -> Iterator[Make]:
    with contextlib.ExitStack() as stack:

        def pool_of(
            env: str = ENV,
            settings: dict[str, Any] | None = None,
            *,
            num_envs: int = 4,
            batch_size: int = 2,
            spec: dict[str, Any] | None = None,
            on_message: Callable[[str], None] = lambda _: None,
            **remote: Any,
        ) -> GrpcPool:
            family = catalog.environment_family(env)
            config = family.config_type(**(settings or {}))
            own = dataclasses.replace(family.spec(env, config), **(spec or {}))
            pool = GrpcPool(
                WorkerEnvs(
                    env=env,
                    settings=dataclasses.asdict(config),
                    spec=own,
                    num_envs=num_envs,
                    seed=3,
                ),
                batch_size=batch_size,
                remote=RemoteConfig(**remote),
                workers=WorkerConfig(),
                on_message=on_message,
            )
            stack.callback(pool.close)
            return pool

        yield pool_of


def play(pool: Pool, until: Callable[[EnvStep], bool], limit_s: float = 30.0) -> list[EnvStep]:
    """Plays until a step is what the caller waits for; keeps copies."""
    steps = []
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        step = pool.receive(1.0)
        if step is None:
            continue
        steps.append(EnvStep(*(v.copy() if isinstance(v, np.ndarray) else v for v in step)))
        pool.reply(step.env_id.astype(np.int64) % 3)
        if until(steps[-1]):
            return steps
    raise AssertionError("it never came")


def all_at(count: int, num_envs: int) -> Callable[[EnvStep], bool]:
    """Until so many environments have made so many steps."""
    at: dict[int, int] = {}

    def done(step: EnvStep) -> bool:
        at.update(dict.fromkeys(step.env_id.tolist(), 0) | at)
        for env_id in step.env_id.tolist():
            at[env_id] += 1
        return len(at) == num_envs and min(at.values()) > count

    return done


@pytest.mark.net
def test_uneven_blocks_on_two_hosts_go_the_way_of_one_process(make: Make, hosts: Hosts) -> None:
    pool = make("catch", num_envs=7, batch_size=3)  # blocks of 2, 2 and 3
    hosts.start(pool, envs=4)
    wait_until(lambda: pool.counters["envs"] == 4)
    hosts.start(pool, envs=3)
    steps = play(pool, all_at(25, 7))
    family = catalog.environment_family("catch")
    env = family.make("catch", family.config_type(), num_envs=7, batch_size=7, threads=1, seed=3)
    ids = np.arange(7, dtype=np.int32)
    action = ids.astype(np.int64) % 3
    wanted = [env.reset().observation.copy()]
    wanted += [env.step(ids, action).observation.copy() for _ in range(25)]
    for env_id in range(7):
        rows = [step.observation[step.env_id == env_id] for step in steps]
        got = np.concatenate([row for row in rows if len(row)])[:26]
        np.testing.assert_array_equal(got, np.stack(wanted)[:, env_id], err_msg=str(env_id))
    assert len([line for line in hosts.said if line.startswith("connected to")]) == 2


@pytest.mark.net
def test_the_end_of_the_run_is_the_end_of_the_host(make: Make, hosts: Hosts) -> None:
    pool = make()
    thread = hosts.start(pool)
    play(pool, all_at(3, 4))
    pool.close()
    thread.join(20.0)
    assert not thread.is_alive()
    assert hosts.errors == []
    assert hosts.said[-1] == f"{pool.address} says: the run is over"


@pytest.mark.net
def test_a_host_finds_a_server_that_returns_and_starts_anew(make: Make, hosts: Hosts) -> None:
    first = make()
    hosts.start(first)
    play(first, all_at(3, 4))
    first._listener.close("somebody pulled the plug")  # without a goodbye
    second = make(listen=first.address)
    steps = play(second, all_at(3, 4))
    assert (steps[0].observation[:, COUNT] == 0).all()
    assert {int(run_id) for step in steps for run_id in step.run_id} == {0}
    assert any("pulled the plug" in line and "tries again" in line for line in hosts.said), (
        hosts.said
    )


@pytest.mark.net
def test_another_spec_is_named_on_both_sides(make: Make, hosts: Hosts) -> None:
    told: list[str] = []
    pool = make(spec={"frame_stack": 4}, on_message=told.append)
    hosts.start(pool).join(20.0)
    assert len(hosts.errors) == 1
    assert isinstance(hosts.errors[0], ConfigError)
    named = "frame_stack is 1 here and 4 at the other end"
    assert named in str(hosts.errors[0])
    wait_until(lambda: any("is gone" in line and named in line for line in told))
    assert pool.deaths == 1


@pytest.mark.net
def test_what_an_environment_dies_of_is_said_on_both_sides(make: Make, hosts: Hosts) -> None:
    told: list[str] = []
    pool = make(settings={"trouble": "raise", "trouble_at": 2}, on_message=told.append)
    thread = hosts.start(pool)
    play(pool, lambda step: (step.observation[:, COUNT] == 1).all())
    while thread.is_alive():
        step = pool.receive(0.05)
        if step is not None:
            pool.reply(np.zeros(len(step.env_id), np.int64))
    assert "the moon" in str(hosts.errors[0])
    wait_until(lambda: any("is gone" in line and "the moon" in line for line in told))


@pytest.mark.net
def test_code_of_others_is_not_imported_unasked(make: Make, hosts: Hosts) -> None:
    told: list[str] = []
    pool = make(on_message=told.append)
    hosts.start(pool, trust_code=False).join(20.0)
    assert "--trust-code" in str(hosts.errors[0])
    wait_until(lambda: any("is gone" in line and "--trust-code" in line for line in told))


@pytest.mark.net
def test_what_is_not_installed_at_a_host_is_said_on_both_sides(
    make: Make, hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    pool = make(on_message=told.append)
    missing = "Atari needs an extra: pip install 'headrace[atari]'"

    def family(*_: object, **__: object) -> None:
        raise ConfigError(missing)

    monkeypatch.setattr(host, "catalog", SimpleNamespace(environment_family=family))
    hosts.start(pool).join(20.0)
    assert [str(error) for error in hosts.errors] == [missing]
    assert isinstance(hosts.errors[0], ConfigError)
    wait_until(lambda: any("is gone" in line for line in told))
    assert [line.count(missing) for line in told if missing in line] == [1]
    assert pool.deaths == 1


@pytest.mark.net
def test_a_host_that_comes_as_the_run_ends_ends_well(make: Make, hosts: Hosts) -> None:
    pool = make()
    table, pool._table = pool._table, None  # it is about to close its port
    hosts.start(pool).join(20.0)
    pool._table = table
    assert hosts.errors == []
    assert hosts.said == [f"{pool.address}: the run is over"]


@pytest.mark.net
def test_a_host_that_is_stopped_says_so(make: Make, hosts: Hosts) -> None:
    told: list[str] = []
    pool = make(on_message=told.append)
    hosts.start(pool)
    play(pool, all_at(2, 4))
    hosts.end()
    assert hosts.errors == []
    wait_until(lambda: any("is gone: it was stopped there" in line for line in told))
    assert pool.deaths == 0


@pytest.mark.net
def test_a_spare_host_takes_over_with_new_run_ids(make: Make, hosts: Hosts) -> None:
    others = Hosts()
    pool = make(num_envs=4, batch_size=2)
    others.start(pool, envs=4)
    before = play(pool, all_at(2, 4))
    hosts.start(pool, envs=4)
    wait_until(lambda: any("have a host" in line for line in hosts.said))
    others.end()
    steps = play(pool, lambda step: bool((step.run_id == RUN_IDS).all()))
    assert (steps[-1].observation[:, COUNT] == 0).all()
    assert steps[-1].reset.all()
    # Another seed: the same games once more would teach nothing.
    assert (steps[-1].observation[:, SEED] != before[0].observation[:, SEED]).all()


def wait_until(done: Callable[[], bool], limit_s: float = 20.0) -> None:
    end_s = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def welcome_of(**changes: Any) -> dict[str, Any]:
    family = catalog.environment_family("catch")
    config = family.config_type()
    return {
        "cut": "steps",
        "env": "catch",
        "settings": dataclasses.asdict(config),
        "spec": describe(family.spec("catch", config)),
        "seed": 3,
        "blocks": [[0, 0, 2, 0], [1, 2, 2, 5]],
        "compression": "off",
        "workers": dataclasses.asdict(WorkerConfig(step_timeout_s=7.0, num_workers=9)),
    } | changes


def test_a_welcome_says_all_that_a_host_needs() -> None:
    task = read_welcome(welcome_of(), cores=6, trust_code=False)
    assert task.blocks == (Granted(0, 0, 2, 0), Granted(1, 2, 2, 5))
    assert task.config.workers.step_timeout_s == 7.0
    assert task.config.workers.num_workers == 3  # the blocks share this machine's cores


@pytest.mark.parametrize(
    "changes",
    [
        {"env": 3},
        {"blocks": [[0, 0]]},
        {"blocks": []},
        {"blocks": None},
        {"settings": {"no_such": 1}},
        {"workers": {"no_such": 1}},
        {"spec": 7},
        {"seed": "x"},
    ],
)
def test_a_welcome_that_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="make no sense"):
        read_welcome(welcome_of(**changes), cores=1, trust_code=False)


@pytest.mark.parametrize("inference", ["server", "worker"])
def test_where_a_run_may_not_listen_is_known_before_it_has_a_directory(
    inference: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    config = from_dict(
        {
            "env": "catch",
            "algorithm": "impala",
            "inference": inference,
            "device": "cpu",
            "out": str(out),
            "remote": {"listen": "0.0.0.0:0"},
        }
    )
    with pytest.raises(ConfigError, match="needs a token"):
        prepare(config)
    assert not out.exists()


def test_compression_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lz4", None)
    with pytest.raises(ConfigError, match=r"needs an extra on every machine: .*headrace\[cluster"):
        read_welcome(welcome_of(compression="lz4"), cores=1, trust_code=False)


def test_run_ids_count_from_0_whatever_the_pool_has() -> None:
    run_ids = RunIds(3)
    all_of_them = np.arange(3, dtype=np.int32)
    first = run_ids.of(all_of_them, np.array([5 << 32, 7, 7]))
    assert first.tolist() == [0, 0, 0]
    assert run_ids.of(all_of_them[::-1], np.array([7, 7, 5 << 32])).tolist() == [0, 0, 0]
    assert run_ids.of(all_of_them, np.array([6 << 32, 7, 7])).tolist() == [1, 0, 0]
    assert run_ids.of(all_of_them, np.array([6 << 32, 8, 7])).tolist() == [1, 1, 0]


class Shuffled:
    """A pool that gives its rows in another order each time, and shows what reached whom."""

    def __init__(self, spec: EnvSpec) -> None:
        self.spec = spec
        self.replied: list[tuple[list[int], list[int]]] = []
        self._rng = np.random.default_rng(0)
        self._order = np.arange(4, dtype=np.int32)

    def receive(self, timeout_s: float) -> EnvStep:
        self._order = self._rng.permutation(4).astype(np.int32)
        shown = np.zeros((4, *self.spec.observation_space.shape), np.float32)
        shown[:, ENV_ID] = self._order
        flags = np.zeros(4, np.bool_)
        zeros = np.zeros(4, np.int64)
        rewards = np.zeros(4, np.float32)
        return EnvStep(self._order, zeros, shown, rewards, flags, flags, flags, None)

    def reply(self, action: np.ndarray) -> None:
        self.replied.append((self._order.tolist(), action.tolist()))

    def close(self) -> None:
        pass


def test_actions_reach_the_rows_of_their_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    family = catalog.environment_family(ENV)
    pool = Shuffled(family.spec(ENV, family.config_type()))
    monkeypatch.setattr(host_blocks, "make_pool", lambda *_, **__: pool)
    sent: SimpleQueue[Message] = SimpleQueue()
    config: Any = type("Config", (), {"env": ENV})()
    thread = BlockThread(
        Granted(2, 8, 4, 0),
        Task(config, 1, (), "off", pool.spec),
        lambda data: sent.put(wire.decode(data)),
        note=lambda _: None,
        in_process=True,
    )
    for sequence in range(10):
        step = sent.get(timeout=20.0)
        assert (step.kind, step.block, step.sequence) == (Kind.STEP, 2, sequence)
        assert step.arrays[0][:, ENV_ID].tolist() == [0, 1, 2, 3]
        answer = encode_action(np.arange(4), block=2, sequence=sequence)
        thread.actions.put(wire.decode(answer))
    sent.get(timeout=20.0)
    thread.end()
    thread.join(20.0)
    assert thread.error is None
    assert thread.steps == 40
    assert len(pool.replied) == 10
    assert all(order == action for order, action in pool.replied)


def test_an_answer_to_another_step_ends_the_block() -> None:
    task = read_welcome(welcome_of(blocks=[[0, 0, 2, 0]]), cores=1, trust_code=False)
    sent: SimpleQueue[bytes] = SimpleQueue()
    thread = BlockThread(task.blocks[0], task, sent.put, note=lambda _: None, in_process=True)
    sent.get(timeout=20.0)
    thread.actions.put(wire.decode(encode_action(np.zeros(2, np.int64), block=0, sequence=1)))
    thread.join(20.0)
    assert "an answer to step 1" in str(thread.error)


def test_a_link_that_is_lost_ends_the_block() -> None:
    task = read_welcome(welcome_of(blocks=[[0, 0, 2, 0]]), cores=1, trust_code=False)

    def send(_: bytes) -> None:
        raise PeerLost("it is gone")

    thread = BlockThread(task.blocks[0], task, send, note=lambda _: None, in_process=True)
    thread.join(20.0)
    assert isinstance(thread.error, host_blocks.LinkLost)
