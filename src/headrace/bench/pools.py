"""Pools without a policy: agent steps per second, and how long an action takes to come back."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from headrace import catalog
from headrace.bench import lone, stages
from headrace.bench.settings import (
    OutputArguments,
    PolicyArguments,
    check_positive,
    parsed,
    print_rows,
    run_config,
)
from headrace.errors import ConfigError, DeadlineExceeded, PeerLost
from headrace.pools.grpc import GrpcPool
from headrace.pools.processes import WorkerProcess
from headrace.resources import usable_cores
from headrace.run.pools import make_pool, pool_name

POOLS = ("native", "inline", "shm", "grpc", "gymnasium-async", "alone")
FREE = "headrace.bench.free_env:FreeEnv"
HOST_MODULE = "headrace.run.host"


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Steps environments with random actions, through our pools and through what else there is.

    shm and inline are ours, native is an environment's own threads behind our seam. grpc is a
    worker host, here a process of its own over loopback, with whatever suits the environment.
    gymnasium-async is Gymnasium's AsyncVectorEnv, a process for each environment. alone is what as
    many processes reach that step the same environments and talk to nobody. The latency runs from
    the reply to an environment until its next row is there; it includes the wait for the rest of
    its batch.
    """

    env: tuple[str, ...] = ("",)
    """Names the environments; "" is one in Python that costs `env_cost_us`."""
    envs: tuple[int, ...] = (64,)
    """Steps so many environments in a pool: one row for each number."""
    env_cost_us: tuple[float, ...] = (0.0, 100.0)
    """Takes so many microseconds of a core for one step of "": one row for each."""
    frame_shape: tuple[int, ...] = ()
    """Makes "" show a frame of bytes of this shape, as 84 84; empty shows four numbers."""
    pools: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--pool",))] = (
        *("native", "shm", "gymnasium-async", "alone"),
    )
    """Names what to measure; what does not apply to an environment is left out."""
    batch_size: int = 0
    """Answers so many environments at once; 0 takes half of them."""
    num_workers: int = 0
    """Takes so many worker processes of shm and alone, threads of a native pool, and processors of
    the worker host of grpc; 0 takes one per core."""
    envs_per_message: int = 0
    """Sends so many environments in one message of grpc; 0 takes those answered at once, at most
    64."""
    message_compression: Literal["off", "lz4"] = "off"
    """Compresses the messages of grpc."""
    seconds: float = 5.0
    """Measures each row for so many seconds."""
    output: OutputArguments = field(default_factory=OutputArguments)

    def __post_init__(self) -> None:
        check_positive(seconds=self.seconds, envs=min(self.envs, default=0))
        for pool in self.pools:
            if pool not in POOLS:
                raise ConfigError(f"--pools: {catalog.nearest(pool, POOLS)}, not {pool!r}")
        if min(self.env_cost_us, default=0.0) < 0:
            raise ConfigError("--env-cost-us must not be negative")
        if min(self.frame_shape, default=1) < 1:
            raise ConfigError("--frame-shape must be positive")


SMOKE = Arguments(
    output=OutputArguments(smoke=True), envs=(4,), env_cost_us=(0.0,), seconds=0.3, num_workers=2
)


def run(argv: list[str]) -> None:
    """Measures what `argv` asks for and prints it."""
    arguments = parsed("pools", argv, Arguments(), smoke=SMOKE)
    rows = []
    for env in arguments.env:
        for num_envs in arguments.envs:
            for cost_us in (None,) if env else arguments.env_cost_us:
                rows += list(measure(arguments, env, num_envs, cost_us))
    print_rows("pools, random actions", rows, as_json=arguments.output.json)


def measure(
    arguments: Arguments, env: str, num_envs: int, cost_us: float | None
) -> Iterator[dict[str, Any]]:
    """Yields a row for each pool that can step this environment."""
    kwargs: dict[str, Any] = {} if cost_us is None else {"cost_us": cost_us}
    if not env and arguments.frame_shape:
        kwargs["frame_shape"] = arguments.frame_shape
    workers = min(arguments.num_workers or usable_cores(), num_envs)
    for pool in arguments.pools:
        row = {"pool": pool, "env": env or "free", "envs": num_envs, "env_cost_us": cost_us}
        latency_s: NDArray[np.float64]
        bytes_per_s = None  # on a network
        if pool in ("gymnasium-async", "alone") and _is_gymnasium(env):
            if pool == "alone":
                rate = lone.rate_of_processes(
                    env or FREE,
                    kwargs,
                    num_envs=num_envs,
                    processes=workers,
                    seconds=arguments.seconds,
                )
                latency_s = np.full(1, np.nan)
            else:
                rate, latency_s = lone.rate_of_async_vector(
                    env or FREE, kwargs, num_envs=num_envs, seconds=arguments.seconds
                )
        else:
            measured = _ours(arguments, pool, env, num_envs, kwargs)
            if measured is None:
                continue
            rate, latency_s, bytes_per_s = measured
        p50_us, p99_us = np.quantile(latency_s * 1e6, (0.5, 0.99))
        yield {
            **row,
            "agent_steps_per_s": rate,
            "latency_us_p50": None if np.isnan(p50_us) else float(p50_us),
            "latency_us_p99": None if np.isnan(p99_us) else float(p99_us),
            "bytes_per_s": bytes_per_s,
        }


def _ours(
    arguments: Arguments, pool: str, env: str, num_envs: int, kwargs: dict[str, Any]
) -> tuple[float, NDArray[np.float64], float | None] | None:
    """Returns steps per second, latencies and, where they travel, bytes per second there and back.

    None if this pool cannot step this environment.
    """
    if pool in ("gymnasium-async", "alone"):
        return None
    try:
        own = catalog.environment_family(env or FREE).pool
        if pool != "grpc" and (pool == "native") != (own == "native"):
            return None
        environment = {"env_kwargs": json.dumps(kwargs)} if kwargs else {}
        config = run_config(
            PolicyArguments(env=env or FREE, network="auto"),
            server={"num_envs": num_envs},
            env_threads=arguments.num_workers,
            workers={"num_workers": arguments.num_workers},
            remote={
                "envs_per_message": arguments.envs_per_message,
                "message_compression": arguments.message_compression,
            },
            environment=environment,
            pool="auto" if pool == own else pool,
        )
        assert pool_name(config, own) == pool
        spec = catalog.environment_family(config.env).spec(config.env, config.environment)
        batch = spec.whole_vectors(arguments.batch_size or (num_envs + 1) // 2)
        made = make_pool(config, num_envs=num_envs, batch_size=batch, seed=config.seed)
    except ConfigError as missing:
        print(f"{pool}, {env} left out: {missing}", file=sys.stderr)
        return None
    with contextlib.ExitStack() as stack:
        if isinstance(made, GrpcPool):
            host = WorkerProcess(
                HOST_MODULE,
                {
                    "link": {"connect": made.address},
                    "envs": num_envs,
                    "cores": arguments.num_workers,
                    "trust_code": True,
                },
                name="headrace worker host",
            )
            stack.callback(host.close)
        stack.callback(made.close)  # first: the host leaves at that
        try:
            timing, latency_s = stages.environment_alone(made, arguments.seconds)
        except DeadlineExceeded as late:
            cause = host.death() if isinstance(made, GrpcPool) else None
            raise late if cause is None else PeerLost(f"the worker host died: {cause}") from late
        if not isinstance(made, GrpcPool):
            return timing.per_s, latency_s, None
        # Of all messages since the start, of which those of a step are nearly all.
        counters = made.counters
        row_nbytes = (counters["bytes_in"] + counters["bytes_out"]) / made.rows_received
        return timing.per_s, latency_s, row_nbytes * timing.per_s


def _is_gymnasium(env: str) -> bool:
    """Whether Gymnasium, too, can make this environment by its name."""
    family = catalog.environment_family(env or FREE)
    return bool(family is catalog.import_attribute("environment", catalog.GYMNASIUM))
