"""Puts the parts of one process together from a config."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headrace import catalog
from headrace.algorithms.base import Algorithm
from headrace.config import RunConfig, takes_turns
from headrace.errors import ConfigError
from headrace.experience.fifo import Slots
from headrace.experience.unrolls import UnrollTable
from headrace.learner.feeds import Feed
from headrace.networks.action_values import ActionValueNet
from headrace.networks.actor_critics import ActorCriticsNet
from headrace.networks.config import HEADS_OF
from headrace.networks.models import PolicyValueNet, default_network, lower_precision
from headrace.run.acting_workers import ActingWorkers
from headrace.run.compute import Compute, choose_compute, compile_update, place_sides
from headrace.run.experience import make_feed, make_unrolls, place_replay, queue_capacity
from headrace.run.pools import derived_seed, make_pool, pool_name
from headrace.run.system import choose_precision
from headrace.server.acting import Actor, initial_state
from headrace.server.server import OnEpisodes, Seat
from headrace.specs import EnvSpec
from headrace.weights import Weights, WeightsEnd


class Parts(NamedTuple):
    """What a run on one machine is made of."""

    spec: EnvSpec
    compute: Compute
    algorithm: Algorithm
    server_model: nn.Module
    weights: WeightsEnd
    queue: Slots
    unrolls: UnrollTable
    feed: Feed
    source: Seat | ActingWorkers  # what acts for the environments that train
    evaluation: Seat | None
    generator: torch.Generator  # of the actions

    @property
    def seats(self) -> list[Seat]:
        """All pools of the server in this process, training first."""
        return [seat for seat in (self.source, self.evaluation) if isinstance(seat, Seat)]

    @property
    def training(self) -> Seat:
        """The training environments' seat at the server in this process."""
        if not isinstance(self.source, Seat):
            raise RuntimeError("the workers act themselves")
        return self.source

    @property
    def dropped_unrolls(self) -> int:
        """Unrolls that were never finished, since their environment was started anew."""
        source = self.source
        return (self.unrolls if isinstance(source, Seat) else source).dropped_unrolls

    @property
    def unfinished_unrolls(self) -> int:
        """Unrolls under construction: what a run that stops here loses."""
        source = self.source
        return (self.unrolls if isinstance(source, Seat) else source).unfinished()

    @property
    def worker_deaths(self) -> int:
        """Worker processes that have died so far, of training and of evaluation."""
        pools = [getattr(seat.pool, "deaths", 0) for seat in self.seats]
        return sum(pools) + (0 if isinstance(self.source, Seat) else self.source.deaths)

    def close(self) -> None:
        """Ends pools and workers."""
        for seat in self.seats:
            seat.pool.close()
        if not isinstance(self.source, Seat):
            self.source.close()


def make_model(
    config: RunConfig, spec: EnvSpec, device: torch.device, *, trust_code: bool = True
) -> nn.Module:
    """Builds the network on `device`, with the config's seed, in float32.

    Raises:
        ConfigError: it does not fit the environment, or is no network.
    """
    name = network_name(config, spec)
    rule = catalog.resolve("algorithm", catalog.ALGORITHMS, config.algorithm)
    wanted: Any = getattr(rule, "heads", "policy_value")
    network = config.network
    if network.heads == "auto":
        network = dataclasses.replace(network, heads=wanted)
    if HEADS_OF[network.heads] != HEADS_OF[wanted]:
        raise ConfigError(
            f"{config.algorithm} needs heads {wanted}, not {network.heads}: leave out --heads"
        )
    builder: Callable[..., Any] = catalog.resolve(
        "network", catalog.NETWORKS, name, trust_code=trust_code
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(config.seed, 0))
        try:
            model = builder(spec, network)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            if name in catalog.NETWORKS:
                raise
            raise ConfigError(f"network {name}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module) or not hasattr(model, "initial_state"):
        raise ConfigError(
            f"network {name} must return a torch module with initial_state(batch), such as a "
            f"headrace.networks.models.PolicyValueNet, not {type(model).__name__}"
        )
    kinds = {"policy": PolicyValueNet, "values": ActionValueNet, "critics": ActorCriticsNet}
    del kinds[HEADS_OF[network.heads]]
    if isinstance(model, tuple(kinds.values())):
        raise ConfigError(
            f"network {name} is a {type(model).__name__}, and {config.algorithm} needs heads "
            f"{network.heads}: build it with headrace.networks.models.assemble, which gives any"
        )
    return model.to(device)


def network_name(config: RunConfig, spec: EnvSpec) -> str:
    """Returns the catalog name of the network; "auto" is the algorithm's own, if it has one.

    Else it is what suits the observations.
    """
    if config.network.network != "auto":
        return config.network.network
    rule = catalog.resolve("algorithm", catalog.ALGORITHMS, config.algorithm)
    return getattr(rule, "network", None) or default_network(spec)


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
    family = catalog.environment_family(config.env, trust_code=trust_code)
    spec: EnvSpec = family.spec(config.env, config.environment)
    compute = choose_compute(config, spec)
    model = make_model(config, spec, compute.device, trust_code=trust_code)
    algorithm = make_algorithm(config, model, spec, compute.precision, trust_code=trust_code)
    place_sides(config, algorithm)
    queue_capacity(config, algorithm)
    pool_name(config, family.pool)
    place_replay(config, algorithm, spec, model, compute.device)


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
    family = catalog.environment_family(config.env, trust_code=trust_code)
    spec: EnvSpec = family.spec(config.env, config.environment)
    compute = choose_compute(config, spec)
    if compute.device.type == "cuda":
        torch.cuda.set_device(compute.device)  # where events and streams are made
    if compute.compiled:
        torch.compiler.reset()  # shapes of earlier runs in this process would count against ours
        # Two networks, a burn-in, and three sizes of batches of training and of evaluation.
        torch._dynamo.config.recompile_limit = 32
    for notice in getattr(family, "notices", _none)(config.env, config.environment):
        on_message(notice)
    model: Any = make_model(config, spec, compute.device, trust_code=trust_code)
    algorithm = make_algorithm(config, model, spec, compute.precision, trust_code=trust_code)
    if getattr(algorithm, "on_policy", False) and not takes_turns(config):
        on_message(
            f"{config.algorithm} assumes that the policy which acts is the one that learns: see "
            "policy_lag in the metrics; --turns on, or --algorithm impala, which corrects for it"
        )
    server_model: Any = copy.deepcopy(model).requires_grad_(False)
    lower_precision(server_model, compute.precision)
    place_sides(config, algorithm)
    if compute.compiled:
        compile_update(algorithm, server_model, compute.device)
    generator = torch.Generator(compute.device)
    generator.manual_seed(derived_seed(config.seed, 1, resume_count))
    local = Weights(server_model)
    place = place_replay(config, algorithm, spec, server_model, compute.device)
    if place is not None:
        on_message(str(place))
    weights: WeightsEnd = local
    source: Seat | ActingWorkers
    if config.inference == "worker":
        source = _acting_workers(
            config, algorithm, spec, resume_count, local, trust_code=trust_code
        )
        weights = source.weights
        queue: Slots = source.queue
        unrolls = source.unrolls
        source.start(on_episodes, on_message)
    else:
        # Half of them step while the other half is answered. In turns all are answered at once, or
        # one half would run ahead into unrolls that the next update makes old.
        num_envs = config.server.num_envs
        batch = config.server.inference_batch or (num_envs + 1) // 2
        batch = num_envs if takes_turns(config) else batch
        where = compute.device if place is None else place.device
        queue, unrolls = make_unrolls(config, algorithm, spec, server_model, batch, where)
        source = Seat(
            make_pool(
                config,
                num_envs=num_envs,
                batch_size=batch,
                seed=derived_seed(config.seed, 2, resume_count),
                on_message=on_message,
            ),
            Actor(algorithm=algorithm, model=server_model, generator=generator),
            initial_state(spec, server_model, 1, compute.device),
            unrolls=unrolls,
            on_episodes=on_episodes,
            device=compute.device,
            exploration=exploration(algorithm, num_envs),
        )
    try:
        feed = make_feed(
            config,
            algorithm,
            place,
            queue=queue,
            unrolls=unrolls,
            device=compute.device,
            resume_count=resume_count,
        )
        evaluation = _evaluation(
            config,
            algorithm,
            server_model,
            spec,
            resume_count=resume_count,
            on_episodes=on_eval_episodes,
            on_message=on_message,
        )
    except BaseException:
        (source.pool if isinstance(source, Seat) else source).close()
        raise
    return Parts(
        spec,
        compute,
        algorithm,
        server_model,
        weights,
        queue,
        unrolls,
        feed,
        source,
        evaluation,
        generator,
    )


def _evaluation(
    config: RunConfig,
    algorithm: Algorithm,
    server_model: Any,
    spec: EnvSpec,
    *,
    resume_count: int,
    on_episodes: OnEpisodes,
    on_message: Callable[[str], None],
) -> Seat | None:
    """Starts the environments that play greedily beside training, if any are wanted."""
    count = config.server.eval_envs
    if not count:
        return None
    device = next(server_model.parameters()).device
    generator = torch.Generator(device)
    generator.manual_seed(derived_seed(config.seed, 7, resume_count))
    epsilon = getattr(algorithm, "eval_epsilon", 0.0)
    return Seat(
        make_pool(
            config,
            num_envs=count,
            batch_size=count,
            seed=derived_seed(config.seed, 3, resume_count),
            evaluation=True,
            on_message=on_message,
        ),
        Actor(
            algorithm=algorithm,
            model=server_model,
            mode="epsilon" if epsilon else "greedy",
            epsilon=epsilon,
            generator=generator,
        ),
        initial_state(spec, server_model, 1, device),
        unrolls=None,
        on_episodes=on_episodes,
        device=device,
    )


def exploration(algorithm: Algorithm, num_envs: int) -> Tensor | None:
    """Returns the epsilon of each environment that trains, if the algorithm knows any."""
    ladder: Callable[[int], Tensor] | None = getattr(algorithm, "exploration", None)
    return None if ladder is None else ladder(num_envs)


def _none(*_: object) -> tuple[str, ...]:
    return ()


def _acting_workers(
    config: RunConfig,
    algorithm: Algorithm,
    spec: EnvSpec,
    resume_count: int,
    local: Weights,
    *,
    trust_code: bool,
) -> ActingWorkers:
    """Reserves what acting workers share; they act on processors, whatever learns."""
    cpu = torch.device("cpu")
    model: Any = make_model(config, spec, cpu, trust_code=trust_code).requires_grad_(False)
    lower_precision(model, choose_precision(config.precision, cpu))
    family = catalog.environment_family(config.env)
    return ActingWorkers(
        config,
        spec,
        model,
        experience=algorithm.experience,
        capacity=queue_capacity(config, algorithm),
        # Environments with threads of their own step while their worker answers the others.
        groups=2 if pool_name(config, family.pool) == "native" else 1,
        resume_count=resume_count,
        local=local if config.server.eval_envs else None,
    )
