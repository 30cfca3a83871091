"""What goes wrong with worker hosts, with real processes: others go on, and nothing is spoilt."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace import catalog
from headrace.cli import main
from headrace.pools.grpc import GrpcPool
from headrace.pools.processes import WorkerProcess
from headrace.pools.settings import WorkerConfig
from headrace.pools.shm import WorkerEnvs
from headrace.run.host import HostConfig, run_host
from headrace.steps import RUN_IDS, EnvStep
from headrace.transport.settings import LinkConfig, RemoteConfig

pytestmark = pytest.mark.net

ENV = "worker_envs:ECHO"
ENV_ID, COUNT = range(2)
COMMAND = "from headrace.cli import main; main()"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def make(said: list[str]) -> Iterator[Callable[..., GrpcPool]]:
    pools = []

    def pool_of(**settings: Any) -> GrpcPool:
        family = catalog.environment_family(ENV)
        spec = family.spec(ENV, family.config_type(**settings))
        recipe = WorkerEnvs(env=ENV, settings=settings, spec=spec, num_envs=4, seed=3)
        pools.append(
            GrpcPool(
                recipe,
                batch_size=2,
                remote=RemoteConfig(),
                workers=WorkerConfig(),
                on_message=said.append,
            )
        )
        return pools[-1]

    yield pool_of
    for pool in pools:
        pool.close()


@pytest.fixture
def start() -> Iterator[Callable[..., WorkerProcess]]:
    hosts = []

    def host_of(pool: GrpcPool, envs: int) -> WorkerProcess:
        settings = {"link": {"connect": pool.address}, "envs": envs, "trust_code": True}
        hosts.append(WorkerProcess("headrace.run.host", settings, name="host"))
        return hosts[-1]

    yield host_of
    for host in hosts:
        host.close()


def play(pool: GrpcPool, until: Callable[[EnvStep], bool], limit_s: float = 120.0) -> list[EnvStep]:
    """Plays until a step is what the caller waits for; keeps copies."""
    steps = []
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        step = pool.receive(1.0)
        if step is None:
            continue
        steps.append(EnvStep(*(v.copy() if isinstance(v, np.ndarray) else v for v in step)))
        pool.reply(np.zeros(len(step.env_id), np.int64))
        if until(steps[-1]):
            return steps
    raise AssertionError("it never came")


def begun(run_id: int, envs: set[int]) -> Callable[[EnvStep], bool]:
    """Until these environments have shown rows of that run."""
    left = set(envs)

    def done(step: EnvStep) -> bool:
        left.difference_update(step.env_id[step.run_id == run_id].tolist())
        return not left

    return done


def check_runs(steps: list[EnvStep]) -> None:
    """Of each environment no step is missing or comes twice, and a new run is a plain reset."""
    at: dict[int, tuple[int, int]] = {}
    for step in steps:
        np.testing.assert_array_equal(step.observation[:, ENV_ID], step.env_id)
        for row, env_id in enumerate(step.env_id.tolist()):
            run_id, count = int(step.run_id[row]), int(step.observation[row, COUNT])
            if env_id in at and at[env_id][0] == run_id:
                assert count == at[env_id][1] + 1
            else:
                assert count == 0
                assert step.reset[row]
                assert not step.terminated[row]
                assert not step.truncated[row]
            at[env_id] = run_id, count


def wait_until(done: Callable[[], bool], limit_s: float = 120.0) -> None:
    end_s = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < end_s
        time.sleep(0.01)


@pytest.fixture
def host_here() -> Iterator[Callable[..., None]]:
    """Starts worker hosts in threads of the test, which take two environments each."""
    stop = threading.Event()
    threads = []

    def host_of(address: str) -> None:
        threads.append(
            threading.Thread(
                target=run_host,
                args=(LinkConfig(connect=address), HostConfig(envs=2, trust_code=True)),
                kwargs={"stop": stop.is_set, "on_message": lambda _: None, "in_process": True},
            )
        )
        threads[-1].start()

    yield host_of
    stop.set()
    for thread in threads:
        thread.join(30.0)
        assert not thread.is_alive()


def check_takeover(pool: GrpcPool, said: list[str], lost: int, lose: Callable[[], None]) -> None:
    """Environments `lost` and the next begin anew at the host that waits; the others go on."""
    steps = play(pool, begun(0, {0, 1, 2, 3}))
    lose()
    wait_until(lambda: pool.deaths == 1)
    for _ in range(20):
        steps += play(pool, lambda step: 2 - lost in step.env_id)
    steps += play(pool, begun(RUN_IDS, {lost, lost + 1}))
    check_runs(steps)
    where = f"environments {lost}..{lost + 1}"
    assert sum(f"is gone: its connection broke; {where}" in line for line in said) == 1
    assert sum("connection broke" in line for line in said) == 1


def test_a_host_whose_connection_is_cut_and_one_that_takes_over(
    make: Callable[..., GrpcPool],
    host_here: Callable[..., None],
    make_proxy: Callable[[str], Any],
    said: list[str],
) -> None:
    pool = make()
    proxy = make_proxy(pool.address)
    host_here(proxy.address)
    wait_until(lambda: pool.counters["envs"] == 2)
    host_here(pool.address)
    wait_until(lambda: pool.counters["envs"] == 4)
    check_takeover(pool, said, 0, proxy.cut)


@pytest.mark.slow
def test_a_host_that_is_killed_and_one_that_takes_over(
    make: Callable[..., GrpcPool], start: Callable[..., WorkerProcess], said: list[str]
) -> None:
    pool = make()
    command = [sys.executable, "-c", COMMAND, "worker", "--connect", pool.address]
    path = os.pathsep.join(sys.path)
    with subprocess.Popen(
        [*command, "--envs", "2", "--trust-code"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    ) as typed:
        try:
            victim = start(pool, 2)
            wait_until(lambda: pool.counters["envs"] == 4)
            heir = start(pool, 2)
            pids = {host.peer.hello["pid"]: host for host in pool._assignment.hosts.values()}
            first = pool._assignment.blocks[pids[victim.pid].blocks[0]].first
            check_takeover(pool, said, first, lambda: os.kill(victim.pid, signal.SIGKILL))
            typed.send_signal(signal.SIGTERM)
            assert typed.wait(30.0) == 0
            wait_until(lambda: any("is gone: it was stopped there" in line for line in said))
            heir.close()  # its parent leaves
            wait_until(lambda: pool.counters["envs"] == 0)
            assert pool.deaths == 1
        finally:
            typed.kill()


def test_an_environment_that_dies_is_mended_where_it_is(
    make: Callable[..., GrpcPool],
    start: Callable[..., WorkerProcess],
    said: list[str],
    tmp_path: Path,
) -> None:
    pool = make(trouble="exit", trouble_env=1, trouble_at=3, once=str(tmp_path / "once"))
    host = start(pool, 4)
    steps = play(pool, begun(1, {0, 1}))
    check_runs(steps)
    assert host.death() is None
    wait_until(lambda: pool.deaths == 1)
    assert any("exit code 7" in line for line in said)
    steps = play(pool, lambda step: 2 in step.env_id)
    assert steps[-1].run_id.tolist() == [0, 0]  # the other block knows nothing of it


@pytest.mark.parametrize(
    ("arguments", "code", "said_why"),
    [
        (("--connect", "127.0.0.1:1", "--give-up-s", "0.1"), 1, "nobody listens"),
        (("--connect", "nowhere"), 2, "--connect"),
        (("--connect", "127.0.0.1:1", "--token-file", "/no/such/file"), 2, "/no/such/file"),
        (("--connect", "127.0.0.1:1", "--envs", "-1"), 2, "negative"),
    ],
)
def test_exit_codes(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, said_why: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["worker", *arguments])
    assert ended.value.code == code
    assert said_why in capsys.readouterr().err
