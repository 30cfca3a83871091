"""Who acts beside the environments with `--inference worker`: processes here, or worker hosts."""

from __future__ import annotations

from typing import Any

from headrace import catalog
from headrace.algorithms.base import ExperienceSpec
from headrace.config import RunConfig
from headrace.run.acting_workers import ActingWorkers
from headrace.run.pools import pool_name
from headrace.run.remote_acting import ActingHosts
from headrace.specs import EnvSpec
from headrace.weights import Weights

ActingSource = ActingWorkers | ActingHosts
"""Both look alike to the learner."""


def make_acting_source(
    config: RunConfig,
    spec: EnvSpec,
    model: Any,
    *,
    experience: ExperienceSpec,
    capacity: int,
    resume_count: int,
    local: Weights,
) -> ActingSource:
    """Reserves all memory; starts nothing yet.

    Args:
        config: The run's settings.
        spec: Of the environments.
        model: As those have it who act: on the CPU, in their precision.
        experience: How unrolls are cut and kept.
        capacity: Full unrolls that may wait for the learner.
        resume_count: Sessions of the run before this one.
        local: Weights of the server in this process, if there is evaluation for it to do.
    """
    announced = local if config.server.eval_envs else None
    if config.remote.listen or config.pool == "grpc":
        return ActingHosts(
            config,
            spec,
            model,
            experience=experience,
            capacity=capacity,
            resume_count=resume_count,
            local=announced,
        )
    family = catalog.environment_family(config.env)
    return ActingWorkers(
        config,
        spec,
        model,
        experience=experience,
        capacity=capacity,
        # Environments with threads of their own step while their worker answers the others.
        groups=2 if pool_name(config, family.pool) == "native" else 1,
        resume_count=resume_count,
        local=announced,
    )
