"""Puts the parts of one process together from a config."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from headrace import catalog
from headrace.algorithms.base import Algorithm
from headrace.config import RunConfig
from headrace.errors import ConfigError
from headrace.experience.fifo import SlotQueue
from headrace.experience.unrolls import UnrollTable
from headrace.networks.models import default_network, lower_precision
from headrace.pools.base import Pool
from headrace.pools.shm import ShmPool, WorkerEnvs
from headrace.run.system import choose_device, choose_precision, usable_cores
from headrace.server.acting import Actor, initial_state
from headrace.server.server import OnEpisodes, Seat
from headrace.specs import EnvSpec
from headrace.weights import Weights


class Compute(NamedTuple):
    """Where and how the networks run."""

    device: torch.device
    precision: torch.dtype
    threads: int  # of each compute stage
    compiled: bool

    @property
    def needs_warm_up(self) -> bool:
        """Whether there is something to compile or capture before other threads start."""
        return self.compiled or self.device.type == "cuda"


class Parts(NamedTuple):
    """What a run on one machine is made of."""

    spec: EnvSpec
    compute: Compute
    algorithm: Algorithm
    server_model: nn.Module
    weights: Weights
    queue: SlotQueue
    unrolls: UnrollTable
    training: Seat
    evaluation: Seat | None
    generator: torch.Generator  # of the actions

    @property
    def seats(self) -> list[Seat]:
        """All pools, training first."""
        return [self.training] if self.evaluation is None else [self.training, self.evaluation]


def choose_compute(config: RunConfig) -> Compute:
    """Resolves device, precision, threads and compilation for this machine."""
    device = choose_device(config.device)
    threads = config.compute_threads or _compute_threads(config, usable_cores())
    return Compute(
        device=device,
        precision=choose_precision(config.precision, device),
        threads=threads,
        compiled=config.compile == "on" or (config.compile == "auto" and device.type == "cuda"),
    )


def _compute_threads(config: RunConfig, cores: int) -> int:
    if config.lockstep:
        return 1
    if config.turns:
        return cores
    # Server and learner overlap with one thread each until there are cores that environments leave
    # idle.
    return max(1, cores // 4)


def derived_seed(*parts: int) -> int:
    """Returns a 31-bit seed from several numbers, none of them a neighbour's."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0] >> 1)


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
    if kind == "shm" and not in_process:
        recipe = WorkerEnvs(
            env=config.env,
            settings=dataclasses.asdict(settings),
            spec=family.spec(config.env, settings),
            num_envs=num_envs,
            seed=seed,
        )
        return ShmPool(
            recipe,
            batch_size=batch_size,
            workers=config.workers,
            on_message=on_message,
            full_batches=config.turns and batch_size == num_envs,
        )
    threads = 1 if config.lockstep else min(config.env_threads or usable_cores(), num_envs)
    envs = family.make(
        config.env,
        settings,
        num_envs=num_envs,
        batch_size=batch_size,
        threads=threads,
        seed=seed,
        **({"first_env": first_env} if first_env else {}),  # a user's family may not know it
    )
    kind = "inline" if kind == "shm" else kind
    pool: Pool = catalog.resolve("pool", catalog.POOLS, kind)(envs, batch_size=batch_size)
    return pool


def pool_name(config: RunConfig, own: str) -> str:
    """Returns the catalog name of the pool for environments whose own is `own`.

    Raises:
        ConfigError: they step themselves, and another pool was asked for.
    """
    if config.pool == "auto":
        return "inline" if config.lockstep and own == "shm" else own
    if own == "native":
        raise ConfigError(f"{config.env} steps in threads of its own: leave out --pool")
    if config.pool == "shm" and config.lockstep:
        raise ConfigError("--lockstep steps environments in this process: leave out --pool shm")
    return config.pool


def make_model(
    config: RunConfig, spec: EnvSpec, device: torch.device, *, trust_code: bool = True
) -> nn.Module:
    """Builds the network on `device`, with the config's seed, in float32."""
    builder: Callable[..., nn.Module] = catalog.resolve(
        "network", catalog.NETWORKS, network_name(config, spec), trust_code=trust_code
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(config.seed, 0))
        model = builder(spec, config.network)
    return model.to(device)


def network_name(config: RunConfig, spec: EnvSpec) -> str:
    """Returns the catalog name of the network; "auto" takes what suits the observations."""
    if config.network.network != "auto":
        return config.network.network
    return default_network(spec)


def make_algorithm(
    config: RunConfig,
    model: nn.Module,
    spec: EnvSpec,
    precision: torch.dtype,
    *,
    trust_code: bool = True,
) -> Algorithm:
    """Builds the learning rule around `model`."""
    rule = catalog.resolve("algorithm", catalog.ALGORITHMS, config.algorithm, trust_code=trust_code)
    algorithm: Algorithm = rule(model, config.learning, spec=spec, precision=precision)
    return algorithm


def check(config: RunConfig, *, trust_code: bool = True) -> None:
    """Finds what can be wrong before a run directory is made or an environment started.

    Raises:
        ConfigError: settings that do not fit each other or this machine.
    """
    compute = choose_compute(config)
    family = catalog.environment_family(config.env, trust_code=trust_code)
    spec: EnvSpec = family.spec(config.env, config.environment)
    model = make_model(config, spec, compute.device, trust_code=trust_code)
    algorithm = make_algorithm(config, model, spec, compute.precision, trust_code=trust_code)
    queue_capacity(config, algorithm)
    pool_name(config, family.pool)


def queue_capacity(config: RunConfig, algorithm: Algorithm) -> int:
    """Returns how many full unrolls may wait for the learner.

    Raises:
        ConfigError: fewer than one batch.
    """
    wanted = algorithm.experience.batch_unrolls
    capacity = config.server.queue_unrolls or wanted
    if capacity < wanted:
        raise ConfigError(
            f"queue_unrolls={capacity} can never hold a batch of batch_unrolls={wanted}: "
            "raise --queue-unrolls or lower --batch-unrolls"
        )
    return capacity


def build(
    config: RunConfig,
    *,
    resume_count: int,
    on_episodes: OnEpisodes,
    on_eval_episodes: OnEpisodes,
    on_message: Callable[[str], None] = lambda _: None,
    trust_code: bool = True,
) -> Parts:
    """Builds everything; starts the pools last, so that a mistake costs no environment.

    Raises:
        ConfigError: settings that do not fit each other.
    """
    compute = choose_compute(config)
    if compute.device.type == "cuda":
        torch.cuda.set_device(compute.device)  # where events and streams are made
    if compute.compiled:
        torch.compiler.reset()  # shapes of earlier runs in this process would count against ours
    family = catalog.environment_family(config.env, trust_code=trust_code)
    spec: EnvSpec = family.spec(config.env, config.environment)
    model: Any = make_model(config, spec, compute.device, trust_code=trust_code)
    algorithm = make_algorithm(config, model, spec, compute.precision, trust_code=trust_code)
    server_model: Any = copy.deepcopy(model).requires_grad_(False)
    lower_precision(server_model, compute.precision)
    if compute.compiled:
        model.compile(dynamic=False)
        server_model.compile(dynamic=False)
    server = config.server
    # Half of them step while the other half is answered; lockstep answers all in their order.
    batch = server.inference_batch or (server.num_envs + 1) // 2
    batch = server.num_envs if config.lockstep else batch
    queue, unrolls = make_unrolls(config, algorithm, spec, server_model, batch, compute.device)
    generator = torch.Generator(compute.device)
    generator.manual_seed(derived_seed(config.seed, 1, resume_count))
    example = initial_state(spec, server_model, 1, compute.device)
    training = Seat(
        make_pool(
            config,
            num_envs=server.num_envs,
            batch_size=batch,
            seed=derived_seed(config.seed, 2, resume_count),
            on_message=on_message,
        ),
        Actor(algorithm=algorithm, model=server_model, generator=generator),
        example,
        unrolls=unrolls,
        on_episodes=on_episodes,
        device=compute.device,
    )
    evaluation = None
    if server.eval_envs:
        evaluation = Seat(
            make_pool(
                config,
                num_envs=server.eval_envs,
                batch_size=server.eval_envs,
                seed=derived_seed(config.seed, 3, resume_count),
                evaluation=True,
                on_message=on_message,
            ),
            Actor(algorithm=algorithm, model=server_model, mode="greedy"),
            example,
            unrolls=None,
            on_episodes=on_eval_episodes,
            device=compute.device,
        )
    weights = Weights(server_model)
    return Parts(
        spec,
        compute,
        algorithm,
        server_model,
        weights,
        queue,
        unrolls,
        training,
        evaluation,
        generator,
    )


def make_unrolls(
    config: RunConfig,
    algorithm: Algorithm,
    spec: EnvSpec,
    server_model: Any,
    max_batch: int,
    device: torch.device,
) -> tuple[SlotQueue, UnrollTable]:
    """Allocates slots for what is under construction, waiting, read, and filled by one batch."""
    experience = algorithm.experience
    capacity = queue_capacity(config, algorithm)
    num_envs = config.server.num_envs
    num_slots = num_envs + capacity + max_batch + experience.batch_unrolls
    queue = SlotQueue(num_slots, capacity=capacity)
    unrolls = UnrollTable(
        spec,
        num_envs=num_envs,
        unroll_steps=experience.unroll_steps,
        num_slots=num_slots,
        queue=queue,
        recurrent=server_model.initial_state(1),
        device=device,
    )
    return queue, unrolls
