"""What a learner asks of a host that acts, and whether this host can build it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from headrace import catalog
from headrace.algorithms.base import Algorithm
from headrace.config import RunConfig, from_dict
from headrace.errors import ConfigError
from headrace.networks.models import lower_precision
from headrace.networks.modes import frozen
from headrace.run.build import make_algorithm, make_model
from headrace.run.system import choose_precision
from headrace.specs import EnvSpec
from headrace.transport.messages import describe, spec_difference
from headrace.transport.wire import Compression, check_compression
from headrace.weights import fingerprint

_CPU = torch.device("cpu")


class Mandate(NamedTuple):
    """What a welcome asks for, checked against what this host builds from it."""

    config: RunConfig
    spec: EnvSpec
    model: Any
    algorithm: Algorithm
    first_env: int
    num_envs: int
    max_batch: int
    generation: int
    resume_count: int
    unroll: Any  # columns of the learner's slots, described
    compression: Compression


def read_mandate(welcome: Mapping[str, Any], *, cores: int, trust_code: bool) -> Mandate:
    """Builds spec, network and learning rule from a welcome.

    Args:
        welcome: Its text.
        cores: That this host gives.
        trust_code: Whether to import what it names from outside headrace.

    Raises:
        ConfigError: it makes no sense, names code that is not trusted, or comes out otherwise here.
    """
    try:
        config = from_dict(welcome["config"], trust_code=trust_code)
        workers = dataclasses.replace(config.workers, num_workers=cores)
        config = dataclasses.replace(config, env_threads=cores, workers=workers)
        first, count, batch = map(int, welcome["share"])
        generation, resume_count = int(welcome["generation"]), int(welcome["resume_count"])
        theirs, weights, unroll = welcome["spec"], welcome["weights"], welcome["unroll"]
        compression: Compression = "lz4" if welcome["compression"] == "lz4" else "off"
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the run's settings make no sense here ({type(error).__name__}: {error}): install the "
            "same headrace on both"
        ) from error
    check_compression(compression)
    family = catalog.environment_family(config.env, trust_code=trust_code)
    spec: EnvSpec = family.spec(config.env, config.environment)
    difference = spec_difference(describe(spec), theirs)
    if difference:
        raise ConfigError(
            f"{config.env} is another environment on this host than in the run: {difference}; "
            "install the same packages on both"
        )
    model: Any = frozen(make_model(config, spec, _CPU, trust_code=trust_code))
    algorithm = make_algorithm(config, model, spec, torch.float32, trust_code=trust_code)
    lower_precision(model, choose_precision(config.precision, _CPU))
    if fingerprint(model) != weights:
        raise ConfigError(
            "the network that this host builds has other weights than the run's: install the same "
            "headrace on both, and the same code of the network"
        )
    return Mandate(
        config,
        spec,
        model,
        algorithm,
        first,
        count,
        batch,
        generation,
        resume_count,
        unroll,
        compression,
    )
