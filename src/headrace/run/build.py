"""Puts the parts of one process together from a config."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headrace import catalog
from headrace.algorithms.base import Algorithm
from headrace.apart import Apart
from headrace.config import RunConfig, algorithm_class, takes_turns
from headrace.errors import ConfigError
from headrace.experience.device_unrolls import DeviceUnrolls
from headrace.experience.fifo import Slots
from headrace.experience.unrolls import UnrollTable
from headrace.learner.feeds import Feed
from headrace.networks.heads import popart_head
from headrace.networks.models import HEADS, default_network, heads_named, lower_precision
from headrace.networks.modes import frozen
from headrace.run.acting_source import ActingSource, make_acting_source
from headrace.run.compute import (
    Compute,
    choose_compute,
    compile_update,
    fit_threads,
    place_sides,
)
from headrace.run.device_pool import make_device_pool
from headrace.run.device_seat import make_device_seat
from headrace.run.draws import own_draws
from headrace.run.experience import make_feed, make_unrolls, place_replay, queue_capacity
from headrace.run.pools import inference_batch, make_pool
from headrace.run.seeds import Use, derived_seed
from headrace.run.seen import flattened, seen_as
from headrace.run.share import WHOLE, Share
from headrace.run.system import choose_precision
from headrace.server.acting import Actor, initial_state
from headrace.server.device_seat import AnySeat
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
    unrolls: UnrollTable | DeviceUnrolls
    feed: Feed
    source: AnySeat | ActingSource  # what acts for the environments that train
    evaluation: Seat | None
    generator: torch.Generator  # of the actions

    @property
    def seats(self) -> list[AnySeat]:
        """All pools of the server in this process, training first."""
        return [seat for seat in (self.source, self.evaluation) if isinstance(seat, AnySeat)]

    @property
    def training(self) -> AnySeat:
        """The training environments' seat at the server in this process."""
        if not isinstance(self.source, AnySeat):
            raise RuntimeError("the workers act themselves")
        return self.source

    @property
    def dropped_unrolls(self) -> int:
        """Unrolls that were never finished, since their environment was started anew."""
        source = self.source
        return (self.unrolls if isinstance(source, AnySeat) else source).dropped_unrolls

    @property
    def unfinished_unrolls(self) -> int:
        """Unrolls under construction: what a run that stops here loses."""
        source = self.source
        return (self.unrolls if isinstance(source, AnySeat) else source).unfinished()

    @property
    def worker_deaths(self) -> int:
        """Worker processes that have died so far, of training and of evaluation."""
        pools = [getattr(seat.pool, "deaths", 0) for seat in self.seats]
        return sum(pools) + (0 if isinstance(self.source, AnySeat) else self.source.deaths)

    def close(self) -> None:
        """Ends pools and workers."""
        for seat in self.seats:
            seat.pool.close()
        if not isinstance(self.source, AnySeat):
            self.source.close()


def make_model(
    config: RunConfig, spec: EnvSpec, device: torch.device, *, trust_code: bool = True
) -> nn.Module:
    """Builds the network on `device`, with the config's seed, in float32.

    Raises:
        ConfigError: it does not fit the environment, or is no network.
    """
    name = network_name(config, spec)
    rule = algorithm_class(config.algorithm, trust_code=trust_code)
    network = config.network
    if network.heads == "auto":
        network = dataclasses.replace(network, heads=rule.heads)
    if heads_named(network.heads).network is not heads_named(rule.heads).network:
        raise ConfigError(
            f"{config.algorithm} needs heads {rule.heads}, not {network.heads}: leave out --heads"
        )
    if network.normalize_values and not rule.normalizes_values:
        raise ConfigError(
            f"{config.algorithm} does not learn normalised values: say --no-normalize-values, or "
            "--algorithm impala or ppo"
        )
    builder: Callable[..., Any] = catalog.resolve(
        "network", catalog.NETWORKS, name, trust_code=trust_code
    )
    with own_draws(derived_seed(config.seed, Use.NETWORK)), Apart():
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
    if network.normalize_values and popart_head(model) is None:
        raise ConfigError(
            f"network {name} has no value that can be normalised: build it with "
            "headrace.networks.models.assemble, or say --no-normalize-values"
        )
    kinds = {heads.network for heads in HEADS.values()} - {heads_named(network.heads).network}
    if isinstance(model, tuple(kinds)):
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
    return algorithm_class(config.algorithm).network or default_network(
        spec, config.network.pictures
    )


def _notices(config: RunConfig, family: Any, spec: EnvSpec, algorithm: Algorithm) -> Iterator[str]:
    """Yields what a user should know of a run that begins, a line each."""
    yield from getattr(family, "notices", lambda *_: ())(config.env, config.environment)
    yield chosen(config, spec, algorithm.model)
    yield from flattened(spec, config.network, network_name(config, spec))
    if algorithm.on_policy and not takes_turns(config):
        yield (
            f"{config.algorithm} assumes that the policy which acts is the one that learns: see "
            "policy_lag in the metrics; --turns on, or --algorithm impala, which corrects for it"
        )


def chosen(config: RunConfig, spec: EnvSpec, model: Any) -> str:
    """Says what a policy sees, what it is, and which named settings a run began with.

    Such as "observation (4,) float32 → mlp 64-64, 9 155 parameters; settings: control".
    """
    name = network_name(config, spec)
    seen = seen_as(spec, config.network)
    if spec.frame_stack > 1:
        seen += f", {spec.frame_stack} in a stack"
    if name in ("mlp", "structured"):
        name += " " + "-".join(map(str, config.network.hidden_sizes))
    recurrent = model.initial_state(1)
    if recurrent:
        name += f", LSTM {recurrent[0].shape[-1]}"
    count = f"{sum(part.numel() for part in model.parameters()):,}".replace(",", " ")
    return (
        f"observation {seen} → {name}, {count} parameters; settings: {config.preset or 'as given'}"
    )


def make_algorithm(
    config: RunConfig,
    model: nn.Module,
    spec: EnvSpec,
    precision: torch.dtype,
    *,
    trust_code: bool = True,
) -> Algorithm:
    """Builds the learning rule around `model`."""
    rule: Callable[..., Algorithm] = algorithm_class(config.algorithm, trust_code=trust_code)
    with Apart():
        algorithm = rule(model, config.learning, spec=spec, precision=precision)
    algorithm.draw_apart(derived_seed(config.seed, Use.UPDATES))
    return algorithm


def make_learning(
    config: RunConfig, spec: EnvSpec, *, trust_code: bool = True, learners: int = 1
) -> tuple[Compute, nn.Module, Algorithm]:
    """Builds what one of `learners` on this machine learns with, where it learns."""
    compute = choose_compute(config, spec, learners=learners)
    model = make_model(config, spec, compute.device, trust_code=trust_code)
    algorithm = make_algorithm(config, model, spec, compute.precision, trust_code=trust_code)
    return fit_threads(compute, config, algorithm, spec), model, algorithm


def build(
    config: RunConfig,
    *,
    resume_count: int,
    on_episodes: OnEpisodes,
    on_eval_episodes: OnEpisodes,
    on_message: Callable[[str], None] = lambda _: None,
    trust_code: bool = True,
    share: Share = WHOLE,
) -> Parts:
    """Builds everything; starts the pools last, so that a mistake costs no environment.

    `config` is one learner's, and `share` says which one it is.

    Raises:
        ConfigError: settings that do not fit each other.
    """
    family = catalog.environment_family(config.env, trust_code=trust_code)
    spec: EnvSpec = family.spec(config.env, config.environment)
    compute, model, algorithm = make_learning(
        config, spec, trust_code=trust_code, learners=share.size
    )
    for device in (compute.acting, compute.device):  # where events and streams are made
        if device.type == "cuda":
            torch.cuda.set_device(device)
    if compute.compiled:
        torch.compiler.reset()  # shapes of earlier runs in this process would count against ours
        # Two networks, a burn-in, and three sizes of batches of training and of evaluation.
        torch._dynamo.config.recompile_limit = 32
    for notice in () if share.rank else _notices(config, family, spec, algorithm):
        on_message(notice)
    server_model: Any = frozen(copy.deepcopy(model)).to(compute.acting)
    lower_precision(server_model, compute.acting_precision)
    place_sides(config, algorithm)
    if compute.compiled:
        compile_update(algorithm, server_model, compute.device)
    generator = torch.Generator(compute.acting)
    generator.manual_seed(
        derived_seed(config.seed, Use.SERVER_ACTIONS, resume_count, *share.draws(config))
    )
    actor = Actor(algorithm=algorithm, model=server_model, generator=generator)
    num_envs = config.server.num_envs
    local = Weights(server_model)
    place = place_replay(
        config, algorithm, spec, server_model, compute.device, learners=share.to_fill
    )
    if place is not None:
        on_message(str(place))
    where = compute.device if place is None else place.device
    ours: dict[str, Any] = {
        "num_envs": num_envs,
        "seed": derived_seed(config.seed, Use.TRAINING_ENVIRONMENTS, resume_count),
        "first_env": share.rank * num_envs,
    }
    weights: WeightsEnd = local
    source: AnySeat | ActingSource
    unrolls: UnrollTable | DeviceUnrolls
    if config.inference == "worker":
        source = _acting(
            config,
            algorithm,
            spec=spec,
            resume_count=resume_count,
            local=local,
            on_episodes=on_episodes,
            on_message=on_message,
            trust_code=trust_code,
        )
        weights, unrolls = source.weights, source.unrolls
        queue: Slots = source.queue
    elif config.pool == "device":
        source = make_device_seat(
            config,
            algorithm,
            pool=make_device_pool(config, batch_size=num_envs, device=compute.acting, **ours),
            model=server_model,
            actor=share.actor(actor, config),
            exploration=exploration(algorithm, num_envs, share),
            on_episodes=on_episodes,
            reader=where,
        )
        queue, unrolls = source.unrolls.queue, source.unrolls
    else:
        batch = inference_batch(config, spec.envs_together)
        queue, unrolls = make_unrolls(config, algorithm, spec, server_model, batch, where)
        source = Seat(
            make_pool(config, batch_size=batch, on_message=on_message, **ours),
            share.actor(actor, config),
            initial_state(spec, server_model, 1, compute.acting),
            unrolls=unrolls,
            on_episodes=on_episodes,
            device=compute.acting,
            exploration=exploration(algorithm, num_envs, share),
        )
    try:
        feed = make_feed(
            config,
            algorithm,
            place,
            queue=queue,
            unrolls=unrolls,
            device=compute.device,
            seed=derived_seed(config.seed, Use.REPLAY, resume_count, *share.own),
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
        (source.pool if isinstance(source, AnySeat) else source).close()
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
    count = spec.whole_vectors(config.server.eval_envs)
    if not count:
        return None
    device = next(server_model.parameters()).device
    generator = torch.Generator(device)
    generator.manual_seed(derived_seed(config.seed, Use.EVALUATION_ACTIONS, resume_count))
    epsilon = algorithm.eval_epsilon
    return Seat(
        make_pool(
            config,
            num_envs=count,
            batch_size=count,
            seed=derived_seed(config.seed, Use.EVALUATION_ENVIRONMENTS, resume_count),
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


def exploration(algorithm: Algorithm, num_envs: int, share: Share = WHOLE) -> Tensor | None:
    """Returns the epsilon of each environment that trains here, if the algorithm knows any."""
    ladder = algorithm.exploration(share.size * num_envs)
    first = share.rank * num_envs
    return None if ladder is None else ladder[first:][:num_envs]


def _acting(
    config: RunConfig,
    algorithm: Algorithm,
    *,
    spec: EnvSpec,
    resume_count: int,
    local: Weights,
    on_episodes: OnEpisodes,
    on_message: Callable[[str], None],
    trust_code: bool,
) -> ActingSource:
    """Starts those who act beside their environments: on processors, whatever learns."""
    cpu = torch.device("cpu")
    model: Any = frozen(make_model(config, spec, cpu, trust_code=trust_code))
    lower_precision(model, choose_precision(config.precision, cpu))
    source = make_acting_source(
        config,
        spec,
        model,
        experience=algorithm.experience,
        capacity=queue_capacity(config, algorithm),
        resume_count=resume_count,
        local=local,
    )
    try:
        source.start(on_episodes, on_message)
    except BaseException:
        source.close()
        raise
    return source
