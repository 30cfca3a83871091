"""The learner without a server, over batch sizes."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import tyro

from headrace.bench import stages
from headrace.bench.settings import (
    SMOKE_POLICY,
    OutputArguments,
    PolicyArguments,
    check_positive,
    print_rows,
    run_config,
)
from headrace.errors import ConfigError
from headrace.run.build import build
from headrace.run.system import keep_memory

_FILLING_ENVS = 32  # environments of the free pool that fills the unrolls


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Measures the learner alone: batch from unrolls, update, weights published."""

    policy: PolicyArguments = field(default_factory=PolicyArguments)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the torso's arithmetic."""
    unroll_steps: int = 20
    """Agent steps per unroll."""
    batch_size: tuple[int, ...] = (160, 320, 640, 1280, 2560)
    """Samples per update; multiples of the unroll."""
    seconds: float = 4.0
    """Seconds that each row is measured."""
    output: OutputArguments = field(default_factory=OutputArguments)

    def __post_init__(self) -> None:
        check_positive(
            seconds=self.seconds,
            batch_size=min(self.batch_size, default=0),
            unroll_steps=self.unroll_steps,
        )
        for size in self.batch_size:
            if size % self.unroll_steps:
                raise ConfigError(
                    f"--batch-size must be a multiple of --unroll-steps={self.unroll_steps}, "
                    f"not {size}"
                )


SMOKE = Arguments(
    policy=SMOKE_POLICY, output=OutputArguments(smoke=True), batch_size=(160,), seconds=0.3
)


def run(argv: list[str]) -> None:
    """Measures what `argv` asks for and prints it."""
    arguments = tyro.cli(
        tyro.conf.OmitArgPrefixes[Arguments],
        args=argv,
        default=SMOKE if "--smoke" in argv else Arguments(),
        prog="headrace bench learner",
    )
    keep_memory()
    rows = [measure(arguments, size // arguments.unroll_steps) for size in arguments.batch_size]
    policy = arguments.policy
    print_rows(f"learner: {policy.env}, {policy.network}", rows, as_json=arguments.output.json)


def measure(arguments: Arguments, batch_unrolls: int) -> dict[str, Any]:
    """Returns the row of one batch size."""
    # All but the unrolls is a run's own; its one environment is never stepped.
    config = run_config(
        arguments.policy,
        server={"num_envs": 1},
        learning={"unroll_steps": arguments.unroll_steps, "batch_unrolls": batch_unrolls},
        precision=arguments.precision,
    )
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        parts = build(
            config,
            resume_count=0,
            on_episodes=lambda *_: None,
            on_eval_episodes=lambda *_: None,
        )
        parts.training.pool.close()
        compute = parts.compute
        torch.set_num_threads(compute.threads)
        timing = stages.learner_alone(config, parts, arguments.seconds, num_envs=_FILLING_ENVS)
    return {
        "device": str(compute.device),
        "threads": compute.threads,
        "precision": str(compute.precision).removeprefix("torch."),
        "batch_samples": batch_unrolls * arguments.unroll_steps,
        "batch_unrolls": batch_unrolls,
        "updates_per_s": timing.rounds_per_s,
        "samples_per_s": timing.per_s,
    }
