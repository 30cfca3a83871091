"""What one more core or GPU would bring: estimates from what each stage does alone.

A run cannot be faster than the machine's core time allows, nor than its one learner or its one
server is alone on their threads. Where they take turns, it cannot be faster than one after the
other; environments in the server's own thread are a part of it. How close a run comes to that
bound today is taken to be how close it would come tomorrow. A further GPU takes learner and server
off the cores: of that the bound alone can be told.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from headrace.bench.end_to_end import ceiling_of


class Stages(NamedTuple):
    """What each stage does alone, in agent steps/s."""

    environment: float  # on one thread; with a GPU, on all cores
    inference: float
    learner: float
    samples_per_agent_step: float
    cores: int
    on_gpu: bool  # whether server and learner are on one
    workers_act: bool  # so that inference is spread over cores
    turns: bool = False  # server and learner, so that they never overlap
    inline: bool = False  # environments are stepped in the server's thread

    @classmethod
    def of(
        cls,
        ceiling: Mapping[str, Any],
        *,
        samples_per_agent_step: float,
        cores: int,
        workers_act: bool,
        turns: bool = False,
        inline: bool = False,
    ) -> Stages:
        """Takes the rates from a measured `bench.end_to_end.Ceiling`."""
        return cls(
            environment=float(ceiling["environment"]),
            inference=float(ceiling["inference"]),
            learner=float(ceiling["learner"]),
            samples_per_agent_step=samples_per_agent_step,
            cores=cores,
            on_gpu=ceiling["model"] == "accelerator",
            workers_act=workers_act,
            turns=turns,
            inline=inline and not workers_act,
        )


class Estimates(NamedTuple):
    """Agent steps/s that a change of the machine may bring; none of it is measured."""

    bound: float  # of the machine as it is
    one_more_core: float
    one_more_gpu_at_most: float


def estimate(stages: Stages, agent_steps_per_s: float) -> Estimates:
    """Says what a run at `agent_steps_per_s` may come to."""
    now, then = bound(stages, stages.cores), bound(stages, stages.cores + 1)
    # Stages alone are measured at other times: what is seen to be possible is so.
    return Estimates(now, agent_steps_per_s * then / now, max(agent_steps_per_s, _with_gpu(stages)))


def bound(stages: Stages, cores: int) -> float:
    """Returns what a machine with so many cores could do if no stage ever waited."""
    share, environment = stages.samples_per_agent_step, _environments(stages, cores)
    if stages.turns:
        return 1 / (1 / environment + 1 / stages.inference + 1 / stages.learner)
    ceiling = ceiling_of(
        environment if stages.on_gpu else stages.environment,
        stages.inference,
        stages.learner * share,
        samples_per_agent_step=share,
        cores=None if stages.on_gpu else cores,
    )
    most = ceiling.combined if stages.on_gpu else min(ceiling.combined, stages.learner)
    if stages.inline:
        return min(most, 1 / (1 / environment + 1 / stages.inference))
    return most if stages.workers_act or stages.on_gpu else min(most, stages.inference)


def _with_gpu(stages: Stages) -> float:
    """Environments have the cores for themselves; a first GPU is taken to be beyond all need."""
    if stages.on_gpu and stages.turns:  # they never need two at once
        return bound(stages, stages.cores)
    environment = _environments(stages, stages.cores)
    if stages.on_gpu:  # server and learner get one each
        return min(environment, stages.inference, stages.learner)
    return environment


def _environments(stages: Stages, cores: int) -> float:
    """Returns what all environments together could do on so many cores."""
    if stages.inline:
        return stages.environment
    return stages.environment * cores / (stages.cores if stages.on_gpu else 1)
