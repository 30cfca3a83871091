"""Starts pools: which kind steps a run's environments, and with which seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from headrace import catalog
from headrace.apart import Apart
from headrace.config import RunConfig, takes_turns
from headrace.envs.gymnasium import GymnasiumFamily
from headrace.errors import ConfigError
from headrace.pools.base import Pool
from headrace.pools.inline import InlinePool
from headrace.pools.shm import WorkerEnvs
from headrace.resources import usable_cores
from headrace.run.device_pool import make_device_pool
from headrace.run.worker import own_draws_of
from headrace.specs import vectors_of


def make_pool(
    config: RunConfig,
    *,
    num_envs: int,
    batch_size: int,
    seed: int,
    evaluation: bool = False,
    first_env: int = 0,
    in_process: bool = False,
    on_message: Callable[[str], None] = lambda _: None,
) -> Pool:
    """Starts a pool of the config's environment.

    Args:
        config: The run's settings.
        num_envs: Environments of the pool.
        batch_size: Most of them that are due at a time.
        seed: Of the environments.
        evaluation: Whether they are as agents are judged.
        first_env: Number of the first one, among those of all processes.
        in_process: Start no worker process.
        on_message: Told what is worth a line, such as a worker that died.
    """
    family = catalog.environment_family(config.env)  # trusted, or its spec would not be known
    settings = family.evaluation(config.environment) if evaluation else config.environment
    kind = pool_name(config, family.pool)
    if kind == "device":  # seen from the host; the server's own is made in run/device_seat.py
        return make_device_pool(
            config,
            num_envs=num_envs,
            batch_size=batch_size,
            seed=seed,
            device=torch.device("cpu"),
            evaluation=evaluation,
            first_env=first_env,
        )
    if kind == "grpc" and (evaluation or in_process):
        kind = family.pool  # who judges plays here, and who acts elsewhere has his own
    draws_apart = config.lockstep and isinstance(family, GymnasiumFamily)
    if kind in ("grpc", "shm") and not in_process:
        recipe = WorkerEnvs(
            env=config.env,
            settings=dataclasses.asdict(settings),
            spec=family.spec(config.env, settings),
            num_envs=num_envs,
            seed=seed,
            first_env=first_env,
            draws_apart=draws_apart,
        )
        remote = {"remote": config.remote} if kind == "grpc" else {}
        pool: Pool = catalog.resolve("pool", catalog.POOLS, kind)(
            recipe,
            batch_size=batch_size,
            workers=config.workers,
            on_message=on_message,
            full_batches=takes_turns(config) and batch_size == num_envs,
            **remote,
        )
        return pool
    threads = 1 if config.lockstep else min(config.env_threads or usable_cores(), num_envs)
    own: dict[str, Any] = {"first_env": first_env} if first_env else {}
    of_pool: dict[str, Any] = {}
    if isinstance(family, GymnasiumFamily):
        own |= own_draws_of(seed) if draws_apart else {}
        spec = family.spec(config.env, settings)
        if spec.vector_envs is not None:
            unit = min(spec.envs_together, num_envs)
            of_pool["groups"] = vectors_of(num_envs, most=batch_size, unit=unit)
    with Apart() as apart:
        envs = family.make(
            config.env,
            settings,
            num_envs=num_envs,
            batch_size=batch_size,
            threads=threads,
            seed=seed,
            **own,  # a user's family may know none of it
        )
    kind = "inline" if kind == "shm" else kind
    of_pool |= {"apart": apart} if kind == "inline" else {}
    pool = catalog.resolve("pool", catalog.POOLS, kind)(envs, batch_size=batch_size, **of_pool)
    if isinstance(pool, InlinePool):
        pool.on_message = on_message
    return pool


def inference_batch(config: RunConfig, unit: int = 1) -> int:
    """Returns how many environments of a run are answered at once, at most.

    Half of them step while the other half is answered. In turns all are answered at once, or one
    half would run ahead into unrolls that the next update makes old. It is whole `unit`s, the
    environments of a vector of the user's.
    """
    if takes_turns(config):
        return config.server.num_envs
    batch = config.server.inference_batch or (config.server.num_envs + 1) // 2
    return -(-batch // unit) * unit


def pool_name(config: RunConfig, own: str) -> str:
    """Returns the catalog name of the pool for environments whose own is `own`.

    That is the pool of the process which acts for them: on worker hosts that act, their own.

    Raises:
        ConfigError: another pool was asked for than can be.
    """
    if config.pool == "grpc" or config.remote.listen:
        if config.pool not in ("auto", "grpc"):
            raise ConfigError(
                f"--listen has worker hosts step the environments: leave out --pool {config.pool}, "
                "or --listen"
            )
        if config.lockstep:
            raise ConfigError(
                "--lockstep steps environments in this process: leave out --listen and --pool grpc"
            )
        if config.inference == "worker":
            return own
        if config.remote.envs_per_message > inference_batch(config):
            raise ConfigError(
                "envs_per_message must be at most the environments answered at once, "
                f"{inference_batch(config)}, not {config.remote.envs_per_message}"
            )
        return "grpc"
    if config.pool == "auto":
        return "inline" if config.lockstep and own == "shm" else own
    if own == "native":
        raise ConfigError(f"{config.env} steps in threads of its own: leave out --pool")
    if config.pool == "shm" and config.lockstep:
        raise ConfigError("--lockstep steps environments in this process: leave out --pool shm")
    return config.pool
