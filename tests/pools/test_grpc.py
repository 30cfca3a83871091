"""The server's side of worker hosts, which are a few lines of the test: no socket, no clock."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from headrace import catalog
from headrace.errors import ConfigError, PeerLost
from headrace.pools import grpc as grpc_pool
from headrace.pools.assignment import ENVS_PER_CORE, Assignment
from headrace.pools.grpc import LOOK_S, GrpcPool, reachable
from headrace.pools.settings import WorkerConfig
from headrace.pools.shm import WorkerEnvs
from headrace.steps import RUN_IDS, EnvStep
from headrace.transport import wire
from headrace.transport.connections import Refused
from headrace.transport.messages import encode_step
from headrace.transport.settings import RemoteConfig
from headrace.transport.wire import Kind, WireError

ENV = "worker_envs:ECHO"
ENV_ID, COUNT, ACTION = range(3)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class FakeListener:
    """A listener whose peers are the test's."""

    address = "127.0.0.1:4711"

    def __init__(self, config: RemoteConfig, handler: GrpcPool, *, on_message: Any) -> None:
        self.handler = handler
        self.counters = {"lost": 0, "bytes_in": 0, "bytes_out": 0}
        self.closed: list[str] = []
        self.fault: Exception | None = None

    def check(self) -> None:
        if self.fault is not None:
            raise self.fault

    def close(self, reason: str, *, retry: bool) -> None:
        self.closed.append(reason)


class FakeHost:
    """A worker host of the test: what it is sent, and environments that count."""

    def __init__(self, pool: GrpcPool, name: str = "node1", **hello: Any) -> None:
        self.name = name
        self.hello = {"envs": 0, "cores": 1} | hello
        self.sent: list[wire.Message] = []
        self.closed: list[str] = []
        self.pool = pool
        self.welcome: Mapping[str, Any] = {}

    def send(self, message: bytes) -> None:
        self.sent.append(wire.decode(message))

    def close(self, reason: str, *, retry: bool = True) -> None:
        self.closed.append(reason)

    def come(self) -> "FakeHost":
        self.welcome = self.pool.welcome(self)
        self.pool.take(self, wire.decode(wire.encode(Kind.READY)))
        return self

    def go(self, reason: str = "its connection broke") -> None:
        self.pool.gone(self, reason)

    @property
    def blocks(self) -> list[list[int]]:
        blocks: list[list[int]] = self.welcome["blocks"]
        return blocks

    def step(self, block: int, sequence: int, *, run_id: int = 0, **changes: Any) -> None:
        """Gives a step; what it shows is environment, sequence, and the action before."""
        _, first, rows, _ = next(granted for granted in self.blocks if granted[0] == block)
        shown = np.zeros((rows, *self.pool.spec.observation_space.shape), np.float32)
        shown[:, ENV_ID] = first + np.arange(rows)
        shown[:, COUNT] = sequence
        asked = [m for m in self.sent if m.kind is Kind.ACTION and m.block == block]
        if sequence and len(asked) >= sequence:
            shown[:, ACTION] = asked[sequence - 1].arrays[0]
        never = np.zeros(rows, np.bool_)
        step = EnvStep(
            env_id=np.arange(rows, dtype=np.int32),
            run_id=np.full(rows, run_id, np.int64),
            observation=shown,
            reward=np.zeros(rows, np.float32),
            reset=~never if sequence == 0 else never,
            terminated=never,
            truncated=never,
            final_observation=None,
        )
        data, _ = encode_step(step._replace(**changes), block=block, sequence=sequence)
        self.pool.take(self, wire.decode(data))

    def actions(self) -> list[tuple[int, int, list[int]]]:
        return [(m.block, m.sequence, m.arrays[0].tolist()) for m in self.sent]


Make = Callable[..., GrpcPool]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, clock: Clock, said: list[str]) -> Make:
    monkeypatch.setattr(grpc_pool, "Listener", FakeListener)
    family = catalog.environment_family(ENV)
    spec = family.spec(ENV, family.config_type())

    def pool_of(
        num_envs: int = 4, batch_size: int = 2, full_batches: bool = False, **remote: Any
    ) -> GrpcPool:
        return GrpcPool(
            WorkerEnvs(env=ENV, settings={}, spec=spec, num_envs=num_envs, seed=3),
            batch_size=batch_size,
            remote=RemoteConfig(**remote),
            workers=WorkerConfig(batch_wait_ms=2.0),
            on_message=said.append,
            full_batches=full_batches,
            now_s=clock,
        )

    return pool_of


def receive(pool: GrpcPool) -> EnvStep:
    step = pool.receive(0.0)
    assert step is not None
    return step


def answer(pool: GrpcPool, step: EnvStep, action: int = 0) -> None:
    pool.reply(np.full(len(step.env_id), action, np.int64))


def test_steps_and_actions_alternate_by_block(make: Make) -> None:
    pool = make()
    host = FakeHost(pool).come()
    assert host.blocks == [[0, 0, 2, 0], [1, 2, 2, 0]]
    host.step(1, 0)
    step = receive(pool)
    assert step.env_id.tolist() == [2, 3]
    assert step.run_id.tolist() == [0, 0]
    answer(pool, step, 3)
    host.step(0, 0)
    host.step(1, 1)
    step = receive(pool)
    assert step.env_id.tolist() == [0, 1]
    answer(pool, step, 1)
    step = receive(pool)
    assert step.observation[:, [ENV_ID, COUNT, ACTION]].tolist() == [[2, 1, 3], [3, 1, 3]]
    answer(pool, step, 2)
    assert host.actions() == [(1, 0, [3, 3]), (0, 0, [1, 1]), (1, 1, [2, 2])]
    assert pool.rows_received == 6
    pool.close()


def test_what_breaks_the_alternation_is_garbage(make: Make) -> None:
    pool = make()
    host = FakeHost(pool).come()
    with pytest.raises(WireError, match="of which step 0 was asked for"):
        host.step(0, 1)
    host.step(0, 0)
    with pytest.raises(WireError, match="of which none was asked for"):
        host.step(0, 1)
    other = [granted for granted in host.blocks if granted[0] == 1]
    host.welcome = {"blocks": [*other, [7, 0, 2, 0]]}
    with pytest.raises(WireError, match="block 7"):
        host.step(7, 0)
    with pytest.raises(WireError, match="does not begin with a reset"):
        host.step(1, 0, reset=np.zeros(2, np.bool_))
    for kind in (Kind.ACTION, Kind.UNROLL, Kind.WEIGHTS, Kind.HELLO):
        with pytest.raises(WireError, match=kind.name):
            pool.take(host, wire.decode(wire.encode(kind)))
    for text in ({"deaths": -1}, {"deaths": "x"}, {"note": 3}):
        with pytest.raises(WireError, match="report"):
            pool.take(host, wire.decode(wire.encode(Kind.REPORT, text=text)))
    pool.close()


def test_a_host_that_is_gone_is_out_of_the_line_and_its_block_starts_anew(
    make: Make, said: list[str]
) -> None:
    pool = make()
    first, second = (
        FakeHost(pool, envs=2).come(),
        FakeHost(pool, "node2", envs=2).come(),
    )
    first.step(0, 0)
    first.go()
    assert pool.receive(0.0) is None
    assert pool.counters["envs"] == 2
    second.step(1, 0)
    answer(pool, receive(pool))  # the other goes on
    third = FakeHost(pool, "node3", envs=2).come()
    assert third.blocks == [[0, 0, 2, 1]]
    third.step(0, 0, run_id=5)
    step = receive(pool)
    assert step.run_id.tolist() == [RUN_IDS + 5, RUN_IDS + 5]
    assert step.reset.all()
    answer(pool, step)
    assert [line for line in said if "is gone" in line] == [
        "worker host node1 is gone: its connection broke; environments 0..1 wait for another, and "
        "start anew there"
    ]
    pool.close()


def test_rows_that_are_lent_stay_as_they_are_when_another_host_takes_them(make: Make) -> None:
    pool = make()
    first = FakeHost(pool, envs=2).come()
    first.step(0, 0)
    lent = receive(pool)
    before = lent.observation.copy()
    first.go()
    second = FakeHost(pool, "node2", envs=2).come()
    second.step(0, 0, observation=np.full((2, 4), 9.0, np.float32))
    np.testing.assert_array_equal(lent.observation, before)
    assert lent.run_id.tolist() == [0, 0]
    answer(pool, lent)
    assert first.actions() == second.actions() == []  # it answers nobody
    step = receive(pool)
    assert (step.observation == 9.0).all()
    assert step.run_id.tolist() == [RUN_IDS, RUN_IDS]
    answer(pool, step, 1)
    assert second.actions() == [(0, 0, [1, 1])]
    pool.close()


def test_a_host_that_goes_twice_while_its_rows_are_lent(make: Make) -> None:
    pool = make()
    FakeHost(pool, envs=2).come().step(0, 0)
    first = next(iter(pool._assignment.hosts))
    lent = receive(pool)
    pool.gone(first, "x")
    second = FakeHost(pool, "node2", envs=2).come()
    second.step(0, 0)
    second.go()
    answer(pool, lent)
    assert pool.receive(0.0) is None  # what the second gave is gone with it
    third = FakeHost(pool, "node3", envs=2).come()
    third.step(0, 0)
    assert receive(pool).run_id.tolist() == [2 * RUN_IDS, 2 * RUN_IDS]
    pool.close()


def test_more_hosts_than_blocks_wait_and_fewer_leave_blocks_free(make: Make) -> None:
    pool = make(num_envs=5, batch_size=2)  # 3 blocks: of 1, 2 and 2
    greedy = FakeHost(pool, envs=4).come()
    assert [(first, size) for _, first, size, _ in greedy.blocks] == [(0, 1), (1, 2)]
    second = FakeHost(pool, "node2", envs=100).come()
    assert second.blocks == [[2, 3, 2, 0]]
    with pytest.raises(Refused, match="have a host") as refused:
        FakeHost(pool, "spare").come()
    assert refused.value.retry
    second.go()
    assert FakeHost(pool, "spare").come().blocks == [[2, 3, 2, 1]]
    pool.close()


def test_what_a_host_may_take(make: Make) -> None:
    pool = make(num_envs=400, batch_size=64, max_envs_per_host=200)
    with pytest.raises(Refused, match="--envs 58 or more") as refused:
        FakeHost(pool, envs=57).come()
    assert not refused.value.retry
    for hello in ({"envs": -1}, {"envs": "x"}, {"cores": 0}, {"envs": True}):
        with pytest.raises(Refused, match="no sense"):
            FakeHost(pool, **hello).come()
    one = FakeHost(pool, cores=1).come()  # two blocks at least, so that one steps meanwhile
    assert len(one.blocks) == 2
    many = FakeHost(pool, cores=100).come()
    assert sum(size for _, _, size, _ in many.blocks) <= 200
    assert len(many.blocks) == 3
    pool.close()


def test_blocks_suit_the_batch() -> None:
    def sizes(num_envs: int, batch_size: int, envs: int = 0) -> list[int]:
        grants = Assignment.of(
            num_envs, batch_size=batch_size, envs_per_message=envs, max_envs_per_host=4096
        )
        return [block.size for block in grants.blocks]

    assert sizes(64, 32) == [32, 32]
    assert sizes(64, 64) == [32, 32]  # two hosts have a share
    assert sizes(1024, 512) == [64] * 16
    assert sizes(7, 4, 3) == [2, 2, 3]
    assert sizes(1, 1) == [1]
    assert ENVS_PER_CORE >= 1
    with pytest.raises(ConfigError, match="envs_per_message"):
        sizes(64, 32, 33)
    with pytest.raises(ConfigError, match="max_envs_per_host"):
        Assignment.of(64, batch_size=32, envs_per_message=0, max_envs_per_host=31)


def test_full_batches_wait_for_all_that_began_and_for_nobody_else(make: Make) -> None:
    pool = make(num_envs=6, batch_size=6, full_batches=True, envs_per_message=2)
    first, second = (
        FakeHost(pool, envs=2).come(),
        FakeHost(pool, "node2", envs=2).come(),
    )
    first.step(0, 0)
    assert len(receive(pool).env_id) == 2  # the other has not begun
    pool.reply(np.zeros(2, np.int64))
    second.step(1, 0)
    assert pool.receive(0.0) is None  # the first is stepping
    first.step(0, 1)
    step = receive(pool)
    assert step.env_id.tolist() == [0, 1, 2, 3]
    pool.reply(np.zeros(4, np.int64))
    second.step(1, 1)
    assert pool.receive(0.0) is None
    first.go()
    assert receive(pool).env_id.tolist() == [2, 3]
    pool.close()


def test_a_batch_is_due_by_size_or_by_age(make: Make, clock: Clock) -> None:
    pool = make(num_envs=6, batch_size=4, envs_per_message=2)
    host = FakeHost(pool, envs=6).come()
    host.step(2, 0)
    assert pool.receive(0.0) is None
    host.step(0, 0)
    step = receive(pool)
    assert step.env_id.tolist() == [0, 1, 4, 5]
    assert step.observation[:, ENV_ID].tolist() == [0, 1, 4, 5]
    answer(pool, step)
    host.step(1, 0)
    clock.now_s = 0.0021
    assert receive(pool).env_id.tolist() == [2, 3]
    pool.close()


def test_a_host_that_owes_steps_and_is_silent_is_given_up(
    make: Make, clock: Clock, said: list[str]
) -> None:
    pool = make(host_timeout_s=10.0)
    host = FakeHost(pool).come()

    def wait(seconds: float) -> None:
        for _ in range(int(seconds / LOOK_S)):
            clock.now_s += LOOK_S
            pool.receive(0.0)

    pool.receive(0.0)
    wait(60.0)  # it may take long to start
    host.step(0, 0)
    host.step(1, 0)
    for sequence in range(2):
        answer(pool, receive(pool))
        answer(pool, receive(pool))
        wait(9.0)
        host.step(0, sequence + 1)
        host.step(1, sequence + 1)
    assert host.closed == []
    answer(pool, receive(pool))
    answer(pool, receive(pool))
    wait(11.0)
    assert host.closed == ["it gave no step for 10 s"]
    assert pool.deaths == 1
    assert "is gone: it gave no step for 10 s" in said[-2]
    host.step(0, 3)  # it does not know yet
    assert pool.receive(0.0) is None
    host.go()  # the listener says so too
    assert pool.deaths == 1
    pool.close()


def test_a_server_that_was_away_takes_no_silence_amiss(make: Make, clock: Clock) -> None:
    pool = make(host_timeout_s=10.0, no_host_timeout_s=20.0)
    pool.receive(0.0)
    host = FakeHost(pool).come()
    host.step(0, 0)
    host.step(1, 0)
    answer(pool, receive(pool))
    clock.now_s += 3600.0
    answer(pool, receive(pool))
    clock.now_s += 3600.0
    assert pool.receive(0.0) is None
    assert host.closed == []
    host.go()
    clock.now_s += 3600.0
    assert pool.receive(0.0) is None
    pool.close()


def test_a_run_without_hosts_says_how_to_start_one_and_ends_at_last(
    make: Make, clock: Clock, said: list[str]
) -> None:
    pool = make(no_host_timeout_s=30.0)
    waiting = "waiting for worker hosts on 127.0.0.1:4711: headrace worker --connect 127.0.0.1:4711"
    assert said == [waiting]
    host = FakeHost(pool, envs=2).come()
    assert said[1] == "worker host node1 steps environments 0..1; 2 have no host yet"
    for _ in range(200):
        clock.now_s += LOOK_S
        pool.receive(0.0)
    host.go("its power failed")
    assert said[-1] == waiting
    for _ in range(int(30.0 / LOOK_S)):
        pool.receive(0.0)
        clock.now_s += LOOK_S
    pool.receive(0.0)
    clock.now_s += LOOK_S
    with pytest.raises(PeerLost, match=r"no worker host .* for 30 s; .* node1: its power failed"):
        pool.receive(0.0)
    pool.close()


def test_what_hosts_report_is_counted_and_shown_but_not_for_ever(
    make: Make, said: list[str]
) -> None:
    pool = make()
    host = FakeHost(pool).come()
    pool.take(host, wire.decode(wire.encode(Kind.REPORT, text={"deaths": 2})))
    pool.take(host, wire.decode(wire.encode(Kind.REPORT, text={"deaths": 3})))
    assert pool.deaths == 3
    for number in range(100):
        pool.take(host, wire.decode(wire.encode(Kind.REPORT, text={"note": f"n{number} " * 999})))
    shown = [line for line in said if line.startswith("worker host node1: n")]
    assert len(shown) == 20
    assert max(map(len, shown)) < 600
    pool.close()


def test_what_hosts_report_moves_no_cursor(make: Make, said: list[str]) -> None:
    pool = make()
    host = FakeHost(pool).come()
    pool.take(host, wire.decode(wire.encode(Kind.REPORT, text={"note": "a\x1b[2J\nb"})))
    assert said[-1] == "worker host node1: a\\x1b[2J\n    b"
    pool.close()


def test_close_says_that_the_run_is_over(make: Make, said: list[str]) -> None:
    pool = make()
    host = FakeHost(pool).come()
    pool.close()
    pool.close()
    assert [(m.kind, m.text) for m in host.sent] == [(Kind.BYE, {"reason": "the run is over"})]
    lines = len(said)
    host.go()
    assert len(said) == lines
    with pytest.raises(Refused, match="over"):
        FakeHost(pool).come()
    with pytest.raises(PeerLost):
        pool.receive(0.0)


def test_a_fault_in_the_listeners_thread_ends_the_run(make: Make) -> None:
    pool = make()
    host = FakeHost(pool).come()
    host.step(0, 0)
    listener: Any = pool._listener
    listener.fault = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        pool.receive(0.0)
    pool.close()


def test_what_others_connect_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "head")
    assert reachable("10.0.0.3:4711") == "10.0.0.3:4711"
    assert reachable("0.0.0.0:4711") == reachable("[::]:4711") == "head:4711"
