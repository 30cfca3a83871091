"""The learner without a server, over batch sizes.

`updates_per_s` and `update_frame_rate_hz`, samples through the gradient per second, are those of
a learner that never waits.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from headrace.bench import stages
from headrace.bench.settings import (
    SMOKE_POLICY,
    OutputArguments,
    PolicyArguments,
    check_positive,
    has_replay,
    learning_settings,
    parsed,
    print_rows,
    run_config,
)
from headrace.errors import ConfigError
from headrace.run.system import keep_memory

_FILLING_ENVS = 32  # environments of the free pool that fills the unrolls
_BATCHES = (160, 320, 640, 1280, 2560)  # samples


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Measures the learner alone: batch from unrolls, update, weights published."""

    policy: PolicyArguments = field(default_factory=PolicyArguments)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Sets the arithmetic of the networks' torsos, as in a run."""
    unroll_steps: int | None = None
    """Makes unrolls of so many agent steps; None takes 20, or with a replay the preset's number."""
    batch_size: tuple[int, ...] = ()
    """Makes updates of so many samples, multiples of the unroll; none takes five from 160 to 2560,
    or with a replay the preset's number."""
    seconds: float = 4.0
    """Measures each row for so many seconds."""
    output: OutputArguments = field(default_factory=OutputArguments)

    def __post_init__(self) -> None:
        check_positive(
            seconds=self.seconds,
            batch_size=min(self.batch_size, default=1),
            unroll_steps=self.unroll_steps or 1,
        )

    @property
    def steps(self) -> int | None:
        """Agent steps per unroll; None for the preset's."""
        return self.unroll_steps or (None if has_replay(self.policy.algorithm) else 20)


SMOKE = Arguments(
    policy=SMOKE_POLICY, output=OutputArguments(smoke=True), batch_size=(160,), seconds=0.3
)


def run(argv: list[str]) -> None:
    """Measures what `argv` asks for and prints it."""
    arguments = parsed("learner", argv, Arguments(), smoke=SMOKE)
    keep_memory()
    policy = arguments.policy
    sizes = learning_settings(policy.algorithm, unroll_steps=arguments.steps, batch_unrolls=None)
    own, given = run_config(policy, server={}).learning, sizes.get("unroll_steps")
    steps: int = getattr(own, "unroll_steps", 1) if given is None else given  # 1: transitions
    if any(size % steps for size in arguments.batch_size):
        raise ConfigError(
            f"--batch-size must be multiples of --unroll-steps={steps}, not {arguments.batch_size}"
        )
    unrolls: list[int | None] = [size // steps for size in arguments.batch_size]
    if not unrolls:
        unrolls = [None] if "replay" in sizes else [size // steps for size in _BATCHES]
    rows = [measure(arguments, count) for count in unrolls]
    title = f"learner: {policy.env}, {policy.algorithm}, {policy.network}"
    print_rows(title, rows, as_json=arguments.output.json)


def measure(arguments: Arguments, batch_unrolls: int | None) -> dict[str, Any]:
    """Returns the row of one batch size."""
    policy = arguments.policy
    learning = learning_settings(
        policy.algorithm, unroll_steps=arguments.steps, batch_unrolls=batch_unrolls
    )
    # All but the unrolls is a run's own; its environments are never stepped. A replay's rings are
    # theirs, so there it has as many as fill it.
    num_envs = _FILLING_ENVS if "replay" in learning else 1
    config = run_config(
        policy,
        server={"num_envs": num_envs},
        learning=learning,
        precision=arguments.precision,
    )
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        parts = stages.ready(config)
        parts.training.pool.close()
        experience = parts.algorithm.experience
        timing = stages.learner_alone(config, parts, arguments.seconds, num_envs=_FILLING_ENVS)
    return {
        "device": str(parts.compute.device),
        "threads": parts.compute.threads,
        "precision": str(parts.compute.precision).removeprefix("torch."),
        "compiled": parts.compute.compiled,
        "batch_samples": experience.samples_per_update // experience.passes,
        "batch_unrolls": experience.batch_unrolls,
        "updates_per_s": timing.rounds_per_s,
        "samples_per_s": timing.per_s,
        "update_frame_rate_hz": timing.per_s,
    }
