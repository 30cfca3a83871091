"""Worker hosts that act: what they send is what a worker on this machine writes, and no more.

Hosts here are threads, and messages go by queues, decoded and encoded; at the end over sockets.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from headrace.config import RunConfig, from_dict, merged
from headrace.errors import ConfigError, DeadlineExceeded, PeerLost
from headrace.experience.shared import Share, WorkerSlots
from headrace.presets import find
from headrace.run import acting_workers, build
from headrace.run.acting_host import run_session
from headrace.run.acting_mandate import read_mandate
from headrace.run.acting_source import ActingSource, make_acting_source
from headrace.run.acting_worker import make_worker
from headrace.run.api import prepare, start
from headrace.run.host import HostConfig, run_host
from headrace.run.host_blocks import LinkLost
from headrace.run.local import Hooks
from headrace.run.remote_acting import ActingHosts
from headrace.run.report import Row
from headrace.telemetry.metrics import Waits
from headrace.transport import wire
from headrace.transport.connections import Refused
from headrace.transport.settings import LinkConfig
from headrace.transport.wire import Kind, WireError
from headrace.weights import Weights
from tests.faults.proxy import proxy
from tests.run import test_acting_workers

NUM_ENVS, T, B = 6, 5, 4
RUNS = {
    "impala": {"env": "catch", "learning": {"unroll_steps": T, "batch_unrolls": B}},
    "ppo": {"env": "catch", "learning": {"unroll_steps": T, "batch_unrolls": B}},
    "r2d2": {"env": "recall", "learning": {"burn_in_steps": 2}},
    "sac": {"env": "pointmass", "learning": {}},
}


def a_config(algorithm: str = "impala", *, listen: str = "", **settings: Any) -> RunConfig:
    base = {
        "algorithm": algorithm,
        "device": "cpu",
        "precision": "float32",
        "inference": "worker",
        "tensorboard": False,
        "server": {"num_envs": NUM_ENVS, "spread_unrolls": False},
        "workers": {"num_workers": 1},
        "network": {"hidden_sizes": [16]} if algorithm in ("impala", "ppo") else {},
        "remote": {"listen": listen},
        **RUNS[algorithm],
    }
    return from_dict(merged(base, settings))


def a_source(config: RunConfig) -> tuple[ActingSource, Any]:
    """Builds what `run.build` would; returns the learner's model too."""
    family = build.catalog.environment_family(config.env)
    spec = family.spec(config.env, config.environment)
    model: Any = build.make_model(config, spec, torch.device("cpu"))
    algorithm = build.make_algorithm(config, model, spec, torch.float32)
    source = make_acting_source(
        config,
        spec,
        model,
        experience=algorithm.experience,
        capacity=build.queue_capacity(config, algorithm),
        resume_count=0,
        local=Weights(model),
    )
    return source, model


class Pair:
    """Both ends of a stream: a peer to the learner, a link to the host."""

    def __init__(self, hosts: ActingHosts, name: str = "node1", **hello: Any) -> None:
        self.name, self.server = name, "here:1"
        self.hello = {"envs": NUM_ENVS, "cores": 1, **hello}
        self.closed = ""
        self._hosts = hosts
        self._one_call = threading.RLock()  # at a time, as a listener has it
        self._down: queue.Queue[bytes] = queue.Queue()
        self.welcome = dict(hosts.welcome(self))

    def send(self, message: bytes) -> None:
        self._down.put(message)

    def close(self, reason: str, *, lost: bool = False) -> None:
        with self._one_call:
            self.closed = self.closed or reason
            self._hosts._listener.counters["lost"] += lost
            self._hosts.gone(self, reason)

    def end(self) -> HostClient:
        return HostClient(self)

    def take(self, message: bytes) -> None:
        """Hands a message to the learner; what is garbage closes the stream, as a listener does."""
        with self._one_call:
            if self.closed:
                raise PeerLost(self.closed)
            try:
                self._hosts.take(self, wire.decode(message))
            except WireError as error:
                self.close(f"garbage: {error}")
                raise

    def receive(self, timeout_s: float) -> wire.Message | None:
        until_s = time.monotonic() + timeout_s
        while True:
            if self.closed:
                raise PeerLost(self.closed)
            with contextlib.suppress(queue.Empty):
                left_s = max(0.0, min(0.05, until_s - time.monotonic()))
                return wire.decode(
                    self._down.get(timeout=left_s) if left_s else self._down.get(False)
                )
            if time.monotonic() >= until_s:
                return None


class HostClient:
    """The host's end of a `Pair`."""

    def __init__(self, pair: Pair) -> None:
        self.welcome, self.server = pair.welcome, pair.server
        self.send, self.receive = pair.take, pair.receive
        self.close, self.load = pair.close, 0.0


class HostThread:
    """A host, until it is left alone."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.stopped = threading.Event()
        self.lines: list[str] = []
        self.ended: Any = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.ended = run_session(
                self.pair.end(),
                cores=1,
                trust_code=False,
                stop=self.stopped.is_set,
                on_message=self.lines.append,
            )
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.ended = error
        self.pair.close("its stream has ended")

    def join(self) -> Any:
        self._thread.join(60.0)
        assert not self._thread.is_alive()
        return self.ended


@contextlib.contextmanager
def hosting(*pairs: Pair) -> Iterator[list[HostThread]]:
    hosts = [HostThread(pair) for pair in pairs]
    try:
        yield hosts
    finally:
        for host in hosts:
            host.stopped.set()
        for host in hosts:
            host.join()


def acting_hosts(algorithm: str = "impala", **settings: Any) -> tuple[ActingHosts, Any]:
    source, model = a_source(a_config(algorithm, listen="127.0.0.1:0", **settings))
    assert isinstance(source, ActingHosts)
    source._listener = SimpleNamespace(address="here:1", counters={"lost": 0}, check=lambda: None)
    return source, model


def test_a_host_acts_in_eval_mode() -> None:
    source, _ = acting_hosts()
    mandate = read_mandate(Pair(source).welcome, cores=1, trust_code=False)
    assert not any(part.training for part in mandate.model.modules())


def columns(source: ActingSource, slots: list[int]) -> list[dict[str, np.ndarray]]:
    """Copies all that lies in slots; final frames where they mean something."""
    read = []
    for slot in slots:
        views = {name: column.copy() for name, column in source.unrolls.views(slot).items()}
        if "finals" in views:
            truncated = views["truncated"].copy()
            truncated[0] = False
            views["finals"] = views["finals"][truncated]
        views |= {name: column[slot].copy() for name, column in source.unrolls.of_slot.items()}
        read.append(views)
    return read


def until(done: Callable[[], Any], *hosts: HostThread) -> Any:
    """Waits for something that other threads do."""
    end_s = time.monotonic() + 50.0
    while not (result := done()):
        assert time.monotonic() < end_s, "it never came"
        assert not any(isinstance(host.ended, BaseException) for host in hosts), [
            host.ended for host in hosts
        ]
        time.sleep(0.001)
    return result


def batch(source: ActingSource, count: int, *hosts: HostThread) -> list[dict[str, np.ndarray]]:
    def read() -> list[dict[str, np.ndarray]]:
        with (
            contextlib.suppress(DeadlineExceeded),
            source.queue.reading(count, timeout_s=0.2) as slots,
        ):
            return columns(source, slots)
        return []

    return until(read, *hosts)


def of_a_worker(
    algorithm: str, batches: int, monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, np.ndarray]]:
    """Returns what a worker on this machine writes; its loop runs in this thread."""
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(
        acting_workers, "_Reporting", lambda _, settings, **__: started.append(settings)
    )
    config = a_config(algorithm)
    workers, model = a_source(config)
    workers._start_worker(0, 0)
    (settings,) = started
    freed: list[bytes] = []
    monkeypatch.setattr(workers, "_send", lambda _, data: freed.append(data))
    workers.queue._send = lambda _, data: freed.append(data)
    slots = WorkerSlots(
        settings["free"],
        reserve=Share(*settings["share"]).max_batch,
        generation=0,
        full_fd=settings["full_fd"],
        receive=lambda _: freed.pop(0) if freed else None,
    )

    class Nobody:
        on_episodes = note = staticmethod(lambda *_: None)

    seat, weights = make_worker(config, settings, slots, Nobody())
    workers.weights.publish(model, 3)
    read = []
    while len(read) < batches * NUM_ENVS:
        seat.serve(weights.pull, 1.0, Waits())
        if len(workers.queue) >= NUM_ENVS:
            with workers.queue.reading(NUM_ENVS, timeout_s=0.0) as full:
                read += columns(workers, full)
            assert slots.wait_for_space(0.0)
    seat.pool.close()
    del seat, weights, slots
    workers.close()
    return read


@pytest.mark.parametrize("algorithm", RUNS)
def test_unrolls_are_those_of_a_worker_on_this_machine(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, in their order, with the same seeds and weights."""
    batches = 12 if algorithm == "sac" else 4
    wanted = of_a_worker(algorithm, batches, monkeypatch)
    hosts, model = acting_hosts(algorithm)
    hosts.weights.publish(model, 3)
    with hosting(Pair(hosts)) as threads:
        came = [unroll for _ in range(batches) for unroll in batch(hosts, NUM_ENVS, *threads)]
        until(lambda: hosts.agent_steps >= batches * NUM_ENVS, *threads)
        waits = Waits()
        hosts.check(waits)
    assert len(came) == len(wanted)
    for ours, theirs in zip(came, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for name, column in theirs.items():
            assert ours[name].dtype == column.dtype
            assert (ours[name] == column).all(), name
    assert any(unroll["action"].any() for unroll in came)
    if algorithm == "sac":
        assert any(len(unroll["finals"]) for unroll in came), "no episode met the clock"
    assert "server_for_slots" in waits.read()
    assert hosts.turnaround_s.read()[0] > 0
    assert 0 <= hosts.unfinished() <= NUM_ENVS


def test_a_fault_in_the_listeners_thread_ends_the_run() -> None:
    hosts, _ = acting_hosts()

    def check() -> None:
        raise ZeroDivisionError("a bug")

    listener: Any = hosts._listener
    listener.check = check
    with pytest.raises(ZeroDivisionError):
        hosts.check(Waits())


def test_versions_grow_and_credits_bound_the_lag() -> None:
    hosts, model = acting_hosts()
    episodes: list[Any] = []
    hosts._on_episodes = lambda *ended: episodes.extend(zip(*ended, strict=True))
    hosts.weights.publish(model, 0)
    seen: dict[int, int] = {}
    with hosting(Pair(hosts, envs=4), Pair(hosts, "node2", envs=9)) as threads:
        for version in range(1, 30):
            for unroll in batch(hosts, B, *threads):
                env, rows = int(unroll["env_id"]), unroll["version"]
                assert (np.diff(rows) >= 0).all()
                assert seen.get(env, 0) <= rows[0], "unrolls of an environment come in order"
                assert rows[-1] < version
                seen[env] = int(rows[-1])
            assert len(hosts.queue) <= hosts.queue.capacity + NUM_ENVS
            hosts.weights.publish(model, version)
            hosts.check(Waits())
        assert set(seen) == set(range(NUM_ENVS))
        assert max(seen.values()) > 5, "newer weights never came"
        # The learner stops: hosts stop too, with everything that was let out in the queue.
        until(lambda: len(hosts.queue) > hosts.queue.capacity - 1, *threads)
    hosts.check(Waits())
    assert {int(env) for env, *_ in episodes} == set(range(NUM_ENVS))
    assert hosts.weights.reads < 40
    assert hosts.deaths == 0
    assert [thread.ended for thread in threads] == ["stopped", "stopped"]


def test_a_host_that_is_lost_and_one_that_comes_for_it() -> None:
    hosts, model = acting_hosts()
    lines: list[str] = []
    hosts._on_message = lines.append
    hosts.weights.publish(model, 0)
    first = Pair(hosts)
    with hosting(first) as threads:
        with pytest.raises(Refused, match="all environments have a host") as refused:
            Pair(hosts)
        assert refused.value.retry
        for _ in range(3):
            before = batch(hosts, B, *threads)
        until(lambda: len(hosts.queue) >= B, *threads)
        until(lambda: hosts.unfinished() > 0, *threads)
        first.close("its cable was cut", lost=True)
        assert isinstance(threads[0].join(), LinkLost)
    waiting, steps = len(hosts.queue), hosts.agent_steps
    assert waiting >= B, "what had come whole counts"
    assert hosts.deaths == 1
    assert hosts.dropped_unrolls > 0
    assert any("node1 is gone: its cable was cut; environments 0..5" in line for line in lines)
    assert {int(unroll["run_id"]) for unroll in before} == {0}
    with hosting(Pair(hosts, "node2")) as threads:
        runs = [batch(hosts, 1, *threads)[0]["run_id"] for _ in range(waiting + NUM_ENVS)]
        assert [int(run) for run in runs] == [0] * waiting + [1] * NUM_ENVS
        until(lambda: hosts.agent_steps > steps, *threads)
    assert hosts.deaths == 1
    assert any("node2 is gone: it was stopped there" in line for line in lines)


def an_unroll(hosts: ActingHosts, pair: Pair, **changed: Any) -> bytes:
    sound = {"block": 0, "sequence": 0, "arrays": hosts._format.pack(0)}
    return wire.encode(changed.pop("kind", Kind.UNROLL), **(sound | changed))


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"block": NUM_ENVS}, "was not granted"),
        ({"sequence": 1 << 63}, "was not granted"),
        ({"arrays": []}, "none of this run: 0 arrays"),
        ({"arrays": [np.zeros(3)] * 4}, "none of this run"),
        ({"kind": Kind.STEP}, "no STEP to send"),
        ({"kind": Kind.WEIGHTS, "block": 1}, "chunk 1 of weights"),
        ({"kind": Kind.REPORT}, "a report that counts"),
        ({"kind": Kind.REPORT, "text": {"agent_steps": 1.5}}, "a report that counts"),
    ],
)
def test_garbage_closes_its_host_and_harms_nobody(changed: dict[str, Any], complaint: str) -> None:
    hosts, model = acting_hosts()
    hosts.weights.publish(model, 0)
    pair, other = Pair(hosts, envs=3), Pair(hosts, "node2", envs=3)
    pair.take(an_unroll(hosts, pair))
    with pytest.raises(WireError, match=complaint):
        pair.take(an_unroll(hosts, pair, **changed))
    with pytest.raises(WireError, match="was not granted"):
        other.take(an_unroll(hosts, other))
    other = Pair(hosts, "node3", envs=3)
    other.take(an_unroll(hosts, other, block=other.welcome["share"][0]))
    assert len(hosts.queue) == 2


def test_more_unrolls_than_credits_are_garbage() -> None:
    hosts, model = acting_hosts()
    hosts.weights.publish(model, 0)
    pair = Pair(hosts)
    for _ in range(B + NUM_ENVS):
        pair.take(an_unroll(hosts, pair))
    with pytest.raises(WireError, match="no credit"):
        pair.take(an_unroll(hosts, pair))


COUNTS = {"agent_steps": 3, "unfinished": 1, "dropped": 0, "deaths": 0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"agent_steps": 2},
        {"unfinished": NUM_ENVS + 1},
        {"deaths": True},
        {"dropped": 1 << 70},
        {"waits": {"anything": 1.0}},
        {"waits": [1]},
        {"waits": {"server_for_slots": float("nan")}},
        {"turnaround_s": [1.0]},
        {"episodes": [[NUM_ENVS, 1.0, 5, {}]]},
        {"episodes": [[0, float("inf"), 5, {}]]},
        {"episodes": [[0, 10**400, 5, {}]]},
        {"episodes": [[0, 1.0, 0, {}]]},
        {"episodes": [[0, 1.0, 5, {"x": "y"}]]},
        {"episodes": {"0": 1}},
    ],
)
def test_reports_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    hosts, _ = acting_hosts()
    pair = Pair(hosts)
    pair.take(wire.encode(Kind.REPORT, text=COUNTS))
    assert hosts.agent_steps == 3
    with pytest.raises(WireError, match=r"report|episode"):
        pair.take(wire.encode(Kind.REPORT, text=COUNTS | wrong))
    assert (hosts.agent_steps, hosts.unfinished(), hosts.dropped_unrolls) == (3, 0, 1)


def test_silence_and_loneliness_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    remote = {"host_timeout_s": 2.5, "no_host_timeout_s": 4.5}
    workers = {"start_timeout_s": 5.5}
    hosts, _ = acting_hosts(remote=remote, workers=workers)
    now_s = hosts._looked_s
    monkeypatch.setattr("headrace.run.remote_acting.time.monotonic", lambda: now_s)
    pair, slow = Pair(hosts, envs=3), Pair(hosts, "node2", envs=3)
    pair.take(wire.encode(Kind.READY))

    def look(times: int) -> None:
        nonlocal now_s
        for _ in range(times):
            now_s += 1.0
            hosts.check(Waits())

    look(4)  # at the first look something was new
    assert "gave no sign for 3 s" in pair.closed
    now_s += 1000.0  # the learner was stopped: that is nobody's silence
    look(1)
    assert not slow.closed
    look(2)
    assert "was not ready for 6 s" in slow.closed
    now_s += 1000.0
    look(3)
    with pytest.raises(PeerLost, match=r"no worker host came .* for 4.5 s; the last one was node2"):
        look(2)


def test_a_host_that_is_other_than_the_run_says_so() -> None:
    hosts, _ = acting_hosts()
    pair = Pair(hosts)
    common = {"cores": 1, "trust_code": False, "stop": lambda: False, "on_message": print}
    for name, other, complaint in [
        ("spec", pair.welcome["spec"] | {"frame_stack": 4}, "frame_stack is 1 here and 4"),
        ("weights", 1, "other weights"),
        ("unroll", [], "other columns"),
        ("share", [1], "make no sense"),
        ("config", pair.welcome["config"] | {"env": "os:abort"}, "trust"),
    ]:
        link = pair.end()
        link.welcome = pair.welcome | {name: other}
        with pytest.raises(ConfigError, match=complaint):
            run_session(link, **common)


def test_a_learner_that_waits_is_woken_by_who_wants_weights() -> None:
    hosts, model = acting_hosts()
    hosts.weights.publish(model, 0)
    pair = Pair(hosts)
    assert pair.receive(0.0).kind is Kind.SLOTS
    learner = threading.Thread(target=hosts.queue.wait_for_full, args=(60.0,))
    learner.start()
    for _ in range(3):
        pair.take(wire.encode(Kind.WEIGHTS))
        message = pair.receive(30.0)
        assert message is not None
        assert message.kind is Kind.WEIGHTS
    pair.take(an_unroll(hosts, pair))
    learner.join(60.0)
    assert not learner.is_alive()


def test_a_host_waits_while_its_network_is_slow() -> None:
    hosts, model = acting_hosts()
    hosts.weights.publish(model, 0)
    pair = Pair(hosts)
    loads: list[float] = []

    class Slow(HostClient):
        sent = 0

        def __init__(self, pair: Pair) -> None:
            super().__init__(pair)
            self._send, self.send = self.send, self._counted

        @property
        def load(self) -> float:
            loads.append(0.0 if len(loads) > 20 else 0.9)
            return loads[-1]

        @load.setter
        def load(self, _: float) -> None:
            pass

        def _counted(self, message: bytes) -> None:
            unroll = wire.decode(message).kind is Kind.UNROLL
            assert not unroll or loads[-1] == 0.0, "it did not wait"
            self._send(message)

    pair.end = lambda: Slow(pair)  # type: ignore[method-assign]
    with hosting(pair) as threads:
        assert len(batch(hosts, B, *threads)) == B
    assert loads.count(0.9) == 21


@contextlib.contextmanager
def a_host_at(address: str) -> Iterator[list[str]]:
    """Runs a host in a thread, which connects again and again; yields what it says."""
    stop, lines = threading.Event(), list[str]()

    def host() -> None:
        link, config = LinkConfig(connect=address), HostConfig(envs=8, cores=1, trust_code=True)
        run_host(link, config, stop=stop.is_set, on_message=lines.append)

    thread = threading.Thread(target=host, daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        stop.set()
        thread.join(60.0)
        assert not thread.is_alive(), lines


@pytest.mark.net
def test_a_bad_network_doubles_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Late, cut in two and mended, and cut for good: rows say which step of which run they are."""
    (tmp_path / "numbers_env.py").write_text(test_acting_workers.MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    spread = {"spread_unrolls": True}
    source, model = a_source(
        a_config(env="numbers_env:FAMILY", listen="127.0.0.1:0", server=spread)
    )
    assert isinstance(source, ActingHosts)
    ends: dict[tuple[int, int], int] = {}
    starts: dict[tuple[int, int], int] = {}

    def read() -> bool:
        """Takes a batch, if one comes within half a second."""
        source.check(Waits())
        try:
            with source.queue.reading(B, timeout_s=0.5) as slots:
                unrolls = columns(source, slots)
        except DeadlineExceeded:
            return False
        for unroll in unrolls:
            env, number = unroll["frames"][:, 1:].astype(int).T
            key = int(unroll["env_id"]), int(unroll["run_id"])
            assert (env == key[0]).all()
            first = ends.setdefault(key, int(number[0]))  # a first unroll may begin late
            starts.setdefault(key, first)
            assert (number == first + np.arange(T + 1)).all(), "doubled or lost"
            ends[key] = int(number[-1])
        source.weights.publish(model, source.weights.newest_version + 1)
        return True

    with contextlib.closing(source):
        source.start(lambda *_: None, lambda _: None)
        source.weights.publish(model, 0)
        with proxy(source.address) as network, a_host_at(network.address) as lines:
            network.delay(0.025)
            for _ in range(8):
                until(read)
            network.partition()
            until(lambda: not read())  # when all has come that had passed before
            network.heal()
            for _ in range(8):
                until(read)
            assert {run for _, run in ends} == {0}, "the stream has lived on"
            network.delay(0.0)
            network.cut()
            until(lambda: read() and any(run for _, run in ends))
            assert source.deaths == 1
            assert len(set(starts.values())) > 1, "all unrolls end together"
            assert max(starts.values()) < T
            assert sum("connected" in line for line in lines) == 2, lines


def start_all(
    folder: Path, frames: int, on_listen: Callable[[str], None], on_row: Callable[[Row], None]
) -> tuple[Row, list[str]]:
    """Trains catch with whatever hosts come; returns the last row and all that was said."""
    settings = {
        "env": "catch",
        "out": str(folder / "run"),
        "inference": "worker",
        "device": "cpu",
        "precision": "float32",
        "tensorboard": False,
        "total_frames": frames,
        "log_interval_s": 0.1,
        "server": {"num_envs": 16},
        "remote": {"listen": "127.0.0.1:0"},
    }
    lines: list[str] = []
    prepared = prepare(from_dict(merged(find("catch").values, settings)))
    hooks = Hooks(on_row, lambda *_: None, lambda _: None, lines.append, on_listen)
    result = start(prepared, hooks)
    assert result.finished
    return result.metrics, lines


@pytest.mark.net
def test_catch_is_learned_over_sockets(tmp_path: Path) -> None:
    """With two hosts in threads; one is stopped by its user, and another one comes for it."""
    stops: list[threading.Event] = []
    said: list[list[str]] = []
    threads: list[threading.Thread] = []
    addresses: list[str] = []

    def start_host(address: str) -> None:
        stop, lines = threading.Event(), list[str]()
        stops.append(stop)
        said.append(lines)

        def host() -> None:
            link, config = LinkConfig(connect=address), HostConfig(envs=8, cores=1)
            run_host(link, config, stop=stop.is_set, on_message=lines.append)

        threads.append(threading.Thread(target=host, daemon=True))
        threads[-1].start()

    def on_listen(address: str) -> None:
        addresses.append(address)
        start_host(address)
        start_host(address)

    def on_row(row: Row) -> None:
        if len(stops) == 2 and int(row["updates"]) > 3:
            stops[0].set()
            start_host(addresses[0])

    row, lines = start_all(tmp_path, 20_000, on_listen, on_row)
    for stop, thread in zip(stops, threads, strict=True):
        thread.join(60.0)
        assert not thread.is_alive(), said
        stop.set()
    assert int(row["updates"]) > 10
    assert row["worker_deaths"] == 0, lines
    assert any("is gone: it was stopped there" in line for line in lines), lines
    assert [host[-1].split(": ")[-1] for host in said] == ["stopped", *["the run is over"] * 2]
    assert (row["worker_hosts"], row["worker_host_envs"]) == (2, 16)
    assert int(row["bytes_received"]) > 16 * 20_000, "an observation has 50 float32"
    assert int(row["bytes_sent"]) > 0


@pytest.mark.net
@pytest.mark.slow
def test_a_host_in_another_process_is_killed(tmp_path: Path) -> None:
    hosts: list[subprocess.Popen[bytes]] = []
    addresses: list[str] = []
    lost = threading.Event()

    def start_host(address: str) -> None:
        command = "from headrace.cli import main; main()"
        arguments = ["worker", "--connect", address, "--envs", "8"]
        hosts.append(subprocess.Popen([sys.executable, "-c", command, *arguments]))

    def on_listen(address: str) -> None:
        addresses.append(address)
        start_host(address)
        start_host(address)

    def on_row(row: Row) -> None:
        if len(hosts) == 2 and int(row["updates"]) > 3:
            hosts[0].send_signal(signal.SIGKILL)
            start_host(addresses[0])
        if row["worker_deaths"]:
            lost.set()

    try:
        row, lines = start_all(tmp_path, 60_000, on_listen, on_row)
        ends = [host.wait(60.0) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
            host.wait()
    assert lost.is_set()
    assert row["worker_deaths"] == 1, lines
    assert ends == [-signal.SIGKILL, 0, 0], "the others were told that the run is over"
    assert any("is gone: its connection broke" in line for line in lines), lines
