"""Drives one server with thousands of simulated environments, and finds where it saturates.

    python benchmarks/scale.py                                free environments, messages of 64
    python benchmarks/scale.py --step-ms 8 --delay-ms 0.5     with real latencies and stragglers
    python benchmarks/scale.py --policy                       with a small policy at the server

Hosts are simulated by other processes (`scale_hosts.py`) over real sockets on loopback. Every row
is a server of its own, and a number of hosts. What is offered is what the simulated hosts would
send if their actions came at once; from the knee on, more hosts bring little.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from scale_hosts import OBSERVATION, Task
from scale_simulator import Simulator

from headrace.errors import ConfigError, DeadlineExceeded, PeerLost
from headrace.pools.grpc import GrpcPool
from headrace.pools.settings import WorkerConfig
from headrace.pools.shm import WorkerEnvs
from headrace.specs import EnvSpec
from headrace.transport.settings import RemoteConfig

_FREE = "headrace.bench.free_env:FreeEnv"
_START_S = 60.0
_KNEE = 0.8  # of what hosts get of their offer in the best row
_FULL = 0.9  # of a core
_ABOUT = 0.9  # of the best rate
_WARM_UP_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Finds how many simulated hosts one server can serve."""

    hosts: tuple[int, ...] = (1, 4, 16, 64, 256)
    """Simulates so many worker hosts: a row for each number."""
    envs_per_host: int = 128
    """Gives a host so many environments."""
    envs_per_message: int = 64
    """Sends so many environments in one message."""
    batch: int = 1024
    """Answers at most so many environments at once."""
    batch_wait_ms: float = 2.0
    """Lets a row wait for others at most so many milliseconds before a smaller batch is
    answered."""
    policy: bool = False
    """Acts with a small network and builds unrolls, as a run's server does; else answers at
    once."""
    step_ms: float = 0.0
    """Lets a message's environments take so many milliseconds to step, in the median; 0 takes
    none."""
    step_sigma: float = 0.5
    """Sets sigma of the lognormal distribution around step_ms."""
    delay_ms: float = 0.0
    """Delays the network by so many milliseconds in the median, one way, on top of loopback's."""
    delay_sigma: float = 0.5
    """Sets sigma of the lognormal distribution around delay_ms."""
    stragglers: float = 0.02
    """Lets this share of hosts take longer for their steps."""
    straggler_factor: float = 10.0
    """Says how many times longer they take."""
    lifetime_s: float = 0.0
    """Lets a host go without a word, and come back, after so many seconds on average; 0 never
    does."""
    simulators: int = 1
    """Simulates hosts in so many processes."""
    seconds: float = 5.0
    """Measures each row for so many seconds, after a fifth to warm up."""
    json: bool = False
    """Prints one JSON object and nothing else."""
    smoke: bool = False
    """Runs everything for a moment; the numbers mean nothing."""

    def __post_init__(self) -> None:
        for name in ("envs_per_host", "envs_per_message", "batch", "simulators", "seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be positive")
        if min(self.hosts, default=0) < self.simulators:
            raise ConfigError("--hosts must be at least --simulators")
        if self.envs_per_host % self.envs_per_message:
            raise ConfigError("--envs-per-host must be a multiple of --envs-per-message")

    def offered(self, num_envs: int) -> float | None:
        """Agent steps/s that hosts would make if their actions came at once; None: without end."""
        ways_ms = 2 * self.delay_ms * math.exp(self.delay_sigma**2 / 2)
        step_ms = self.step_ms * math.exp(self.step_sigma**2 / 2)
        if not ways_ms + step_ms:
            return None
        usual = (1 - self.stragglers) / (ways_ms + step_ms)
        slow = self.stragglers / (ways_ms + self.straggler_factor * step_ms)
        return 1e3 * num_envs * (usual + slow)


SMOKE = Arguments(
    smoke=True, hosts=(2, 6), envs_per_host=8, envs_per_message=4, batch=16, seconds=0.4
)


def main() -> None:
    """Measures and prints; a mistake of the user is one sentence and exit code 2."""
    try:
        run()
    except ConfigError as error:
        print(f"scale.py: {error}", file=sys.stderr)
        sys.exit(2)


def run() -> None:
    """Measures and prints."""
    arguments = tyro.cli(
        Arguments, default=SMOKE if "--smoke" in sys.argv else Arguments(), prog="scale.py"
    )
    # Each host has a connection; both ends of it are on this machine.
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    rows = []
    for hosts in arguments.hosts:
        rows.append(measure(arguments, hosts))
        if not arguments.json:
            rate = rows[-1]["agent_steps_per_s"]
            print(f"{hosts} hosts: {rate:,.0f} agent steps/s", file=sys.stderr, flush=True)
    knee = knee_of(rows)
    if arguments.json:
        print(json.dumps({"rows": rows, "knee": knee}))
        return
    Console().print(table(rows))
    print(said(knee, arguments.simulators))


def measure(arguments: Arguments, hosts: int) -> dict[str, Any]:
    """Serves so many hosts for a while; returns a row."""
    with ExitStack() as stack:
        num_envs = hosts * arguments.envs_per_host
        pool = make_pool(arguments, hosts)
        stack.callback(pool.close)
        serve = with_policy(pool) if arguments.policy else free_handed(pool)
        until, simulators = Until(serve), []
        for task in simulators_of(arguments, hosts, pool.address):
            simulators.append(Simulator(task))
            stack.callback(simulators[-1].close)
        for simulator in simulators:
            until.heard(simulator)  # all its hosts are welcome
        until.passed(arguments.seconds * _WARM_UP_SHARE)
        for simulator in simulators:
            simulator.tell("measure")
        before, cpu_s, began_s = dict(pool.counters), time.process_time(), time.perf_counter()
        rows, batches = until.passed(arguments.seconds)
        elapsed_s = time.perf_counter() - began_s
        cpu_s, after = time.process_time() - cpu_s, dict(pool.counters)
        for simulator in simulators:
            simulator.tell("stop")
        seen = [json.loads(until.heard(simulator)) for simulator in simulators]
    nbytes = sum(after[name] - before[name] for name in ("bytes_in", "bytes_out"))
    spread = np.array([each["round_trip_us"] for each in seen])
    offered = arguments.offered(num_envs)
    return {
        "hosts": hosts,
        "envs": num_envs,
        "policy": arguments.policy,
        "agent_steps_per_s": rows / elapsed_s,
        "share_of_offered": offered and rows / elapsed_s / offered,
        "bytes_per_s": nbytes / elapsed_s,
        "messages_per_s": (after["messages_in"] - before["messages_in"]) / elapsed_s,
        # Over processes: the mean of medians, and of 99th percentiles.
        "round_trip_us_p50": float(spread[:, 100].mean()),
        "round_trip_us_p99": float(spread[:, 198].mean()),
        "batch_fill": rows / max(1, batches) / pool.max_batch,
        "server_cores": cpu_s / elapsed_s,
        "simulator_cores": sum(each["cpu_s"] / each["elapsed_s"] for each in seen),
        "hosts_left": sum(each["left"] for each in seen),
        "hosts_joined": sum(each["welcomes"] for each in seen),
    }


def make_pool(arguments: Arguments, hosts: int) -> GrpcPool:
    """Returns a pool that waits for the hosts."""
    num_envs = hosts * arguments.envs_per_host
    spec = EnvSpec(name=_FREE, observation_space=OBSERVATION, action_space=gym.spaces.Discrete(2))
    return GrpcPool(
        WorkerEnvs(env=_FREE, settings={}, spec=spec, num_envs=num_envs, seed=0),
        batch_size=min(arguments.batch, num_envs),
        remote=RemoteConfig(
            envs_per_message=arguments.envs_per_message, max_hosts=hosts + 16, host_timeout_s=30.0
        ),
        workers=WorkerConfig(batch_wait_ms=arguments.batch_wait_ms),
    )


def free_handed(pool: GrpcPool) -> Callable[[], int]:
    """Returns a server that thinks of nothing: it answers with actions drawn beforehand."""
    actions = np.random.default_rng(0).integers(0, 2, pool.max_batch)

    def serve() -> int:
        step = pool.receive(0.1)
        if step is None:
            return 0
        pool.reply(actions[: len(step.env_id)])
        return len(step.env_id)

    return serve


def with_policy(pool: GrpcPool) -> Callable[[], int]:
    """Returns a server as a run has it, whose unrolls are thrown away."""
    import torch  # noqa: PLC0415 - seconds, and only for --policy

    from headrace.bench.settings import PolicyArguments, run_config  # noqa: PLC0415
    from headrace.run.build import build, exploration  # noqa: PLC0415
    from headrace.run.experience import make_unrolls  # noqa: PLC0415
    from headrace.server.acting import Actor, initial_state  # noqa: PLC0415
    from headrace.server.server import Seat  # noqa: PLC0415
    from headrace.telemetry.metrics import Waits  # noqa: PLC0415

    torch.set_num_threads(1)
    policy = PolicyArguments(env=_FREE, network="mlp", compile="off", device="cpu")
    config = run_config(
        policy, server={"num_envs": 2}, learning={"batch_unrolls": 1}, pool="auto", lockstep=True
    )
    parts = build(
        config, resume_count=0, on_episodes=lambda *_: None, on_eval_episodes=lambda *_: None
    )
    parts.close()  # its two environments; network, weights and generator stay
    server = dataclasses.replace(config.server, num_envs=pool.num_envs, inference_batch=0)
    config = dataclasses.replace(config, server=server)
    device, model = parts.compute.device, parts.server_model
    queue, unrolls = make_unrolls(
        config, parts.algorithm, parts.spec, model, pool.max_batch, device
    )
    seat = Seat(
        pool,
        Actor(algorithm=parts.algorithm, model=model, generator=parts.generator),
        initial_state(parts.spec, model, 1, device),
        unrolls=unrolls,
        on_episodes=lambda *_: None,
        device=device,
        exploration=exploration(parts.algorithm, pool.num_envs),
    )
    waits = Waits()

    def serve() -> int:
        count = seat.serve(parts.weights.pull, 0.1, waits)
        full = len(queue)
        if full:
            with queue.reading(full, timeout_s=0.0):
                pass
        return count

    return serve


class Until:
    """Serves on, whatever is waited for."""

    def __init__(self, serve: Callable[[], int]) -> None:
        self._serve = serve

    def passed(self, seconds: float) -> tuple[int, int]:
        """Serves for a while; returns rows and batches."""
        end_s = time.perf_counter() + seconds
        rows = batches = 0
        while time.perf_counter() < end_s:
            count = self._serve()
            rows += count
            batches += count > 0
        return rows, batches

    def heard(self, simulator: Simulator) -> str:
        """Serves until a process has said a line, and returns it.

        Raises:
            PeerLost: the process has ended.
            DeadlineExceeded: it took too long.
        """
        end_s = time.perf_counter() + _START_S
        while simulator.said.empty():
            self._serve()
            if time.perf_counter() > end_s:
                raise DeadlineExceeded(f"a simulator said nothing for {_START_S:.0f} s")
        line = simulator.said.get()
        if not line:
            raise PeerLost("a simulator has ended; its error is above")
        return line


def simulators_of(arguments: Arguments, hosts: int, address: str) -> list[Task]:
    """Returns what each process simulates."""
    names = {each.name for each in dataclasses.fields(Task)}
    common = {key: value for key, value in vars(arguments).items() if key in names}
    parts = np.array_split(np.arange(hosts), arguments.simulators)
    return [
        Task(**{**common, "address": address, "hosts": len(part), "first": int(part[0])})
        for part in parts
    ]


def knee_of(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the row from which on more hosts bring little; None if every row brings all.

    Where hosts take their time it is the first whose hosts each get clearly less than in the best
    row; where they are free, the first that is about as fast as any.
    """
    if rows[0]["share_of_offered"] is None:
        best = max(row["agent_steps_per_s"] for row in rows)
        return next(row for row in rows if row["agent_steps_per_s"] >= _ABOUT * best)
    shares = [row["share_of_offered"] for row in rows]
    return next((row for row in rows if row["share_of_offered"] < _KNEE * max(shares)), None)


def said(knee: dict[str, Any] | None, simulators: int) -> str:
    """Returns what the rows mean."""
    if knee is None:
        return "no row saturates the server: add --hosts"
    server, each = knee["server_cores"], knee["simulator_cores"] / simulators
    if max(server, each) >= _FULL:
        full = "the server's process" if server >= each else "the simulator, not the server"
    elif server + knee["simulator_cores"] >= _FULL * len(os.sched_getaffinity(0)):
        full = "this machine, which simulates too"
    else:
        full = "nothing: steps and network take the time, or others had this machine"
    return (
        f"the knee is at {knee['hosts']} hosts with {knee['envs']:,} environments: "
        f"{knee['agent_steps_per_s']:,.0f} agent steps/s; the server's process keeps {server:.2f} "
        f"cores busy, each of the simulator's {each:.2f}; what is full is {full}"
    )


def table(rows: list[dict[str, Any]]) -> Table:
    """Returns the rows for people."""
    shown = Table(
        title="simulated hosts",
        caption="p50, p99: from a step leaving a host until its actions are there; fill: of a "
        "batch; cores: server + simulator",
        padding=(0, 0),
    )
    columns = ("hosts", "envs", "steps/s", "MB/s", "p50 ms", "p99 ms", "fill", "cores", "offered")
    for name in columns:
        shown.add_column(name, justify="right")
    for row in rows:
        offered = row["share_of_offered"]
        shown.add_row(
            f"{row['hosts']:,}",
            f"{row['envs']:,}",
            f"{row['agent_steps_per_s']:,.0f}",
            f"{row['bytes_per_s'] / 1e6:,.1f}",
            f"{row['round_trip_us_p50'] / 1e3:,.2f}",
            f"{row['round_trip_us_p99'] / 1e3:,.2f}",
            f"{row['batch_fill']:.0%}",
            f"{row['server_cores']:.2f}+{row['simulator_cores']:.2f}",
            "all" if offered is None else f"{offered:.0%}",
        )
    return shown


if __name__ == "__main__":
    main()
