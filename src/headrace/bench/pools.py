"""Pools without a policy: agent steps per second, and how long an action takes to come back."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tyro

from headrace import catalog
from headrace.bench import stages
from headrace.bench.settings import (
    OutputArguments,
    PolicyArguments,
    check_positive,
    print_rows,
    run_config,
)
from headrace.errors import ConfigError
from headrace.run.build import make_pool


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Steps environments with random actions, through the pool that their family has.

    The latency runs from the reply to an environment until its next row is there; it includes the
    wait for the rest of its batch.
    """

    env: tuple[str, ...] = ("ALE/Pong-v5", "catch")
    """Environments; ALE has the pool native, catch the pool inline."""
    num_envs: int = 64
    """Environments of a pool."""
    batch_size: int = 0
    """Environments answered at once; 0 for half of them."""
    env_threads: int = 0
    """Threads that step a native pool; 0 for one per core."""
    seconds: float = 5.0
    """Seconds that each row is measured."""
    output: OutputArguments = field(default_factory=OutputArguments)

    def __post_init__(self) -> None:
        check_positive(seconds=self.seconds, num_envs=self.num_envs)


SMOKE = Arguments(env=("catch",), output=OutputArguments(smoke=True), num_envs=16, seconds=0.3)


def run(argv: list[str]) -> None:
    """Measures what `argv` asks for and prints it."""
    arguments = tyro.cli(
        tyro.conf.OmitArgPrefixes[Arguments],
        args=argv,
        default=SMOKE if "--smoke" in argv else Arguments(),
        prog="headrace bench pools",
    )
    rows = []
    for env in arguments.env:
        try:
            rows.append(measure(arguments, env))
        except ConfigError as missing:
            if arguments.env != Arguments().env:
                raise
            # Unasked, an environment may be one that is not installed.
            print(f"{env} left out: {missing}", file=sys.stderr)
    print_rows("pools, random actions", rows, as_json=arguments.output.json)


def measure(arguments: Arguments, env: str) -> dict[str, Any]:
    """Returns the row of one environment."""
    config = run_config(
        PolicyArguments(env=env, network="auto"),
        server={"num_envs": arguments.num_envs},
        env_threads=arguments.env_threads,
    )
    batch = arguments.batch_size or (arguments.num_envs + 1) // 2
    pool = make_pool(config, num_envs=arguments.num_envs, batch_size=batch, seed=config.seed)
    try:
        timing, latency_s = stages.environment_alone(pool, arguments.seconds)
    finally:
        pool.close()
    p50_us, p99_us = np.quantile(latency_s * 1e6, (0.5, 0.99))
    return {
        "pool": catalog.environment_family(env).pool,
        "env": env,
        "envs": arguments.num_envs,
        "batch": batch,
        "agent_steps_per_s": timing.per_s,
        "latency_us_p50": float(p50_us),
        "latency_us_p99": float(p99_us),
    }
