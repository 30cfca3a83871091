"""The server without environments, over batch sizes and precisions."""

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
    parsed,
    print_rows,
    run_config,
)
from headrace.run.system import choose_device, choose_precision, keep_memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Measures the server alone: state, frame stack, network and unrolls, no environments."""

    policy: PolicyArguments = field(default_factory=PolicyArguments)
    precision: Literal["all", "auto", "float32", "bfloat16"] = "all"
    """Sets the arithmetic of the networks' torsos; all measures float32, and bfloat16 where the
    hardware multiplies it."""
    batch_size: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """Answers so many environments at once: a row for each number."""
    seconds: float = 2.0
    """Measures each row for so many seconds."""
    output: OutputArguments = field(default_factory=OutputArguments)

    def __post_init__(self) -> None:
        check_positive(seconds=self.seconds, batch_size=min(self.batch_size, default=0))


SMOKE = Arguments(
    policy=SMOKE_POLICY, output=OutputArguments(smoke=True), batch_size=(1, 8), seconds=0.2
)


def run(argv: list[str]) -> None:
    """Measures what `argv` asks for and prints it."""
    arguments = parsed("inference", argv, Arguments(), smoke=SMOKE)
    keep_memory()
    rows: list[dict[str, Any]] = []
    for precision in precisions(arguments.precision, choose_device(arguments.policy.device)):
        rows += measure(arguments, precision)
    policy = arguments.policy
    print_rows(f"inference: {policy.env}, {policy.network}", rows, as_json=arguments.output.json)


def precisions(asked: str, device: torch.device) -> list[str]:
    """Returns the precisions that are measured, float32 first."""
    if asked != "all":
        return [asked]
    native = str(choose_precision("auto", device)).removeprefix("torch.")
    return sorted({"float32", native}, reverse=True)


def measure(arguments: Arguments, precision: str) -> list[dict[str, Any]]:
    """Returns a row for every batch size."""
    # The policy is a run's own; its one environment is never stepped.
    config = run_config(arguments.policy, server={"num_envs": 1}, precision=precision)
    rows = []
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        parts = stages.ready(config, compiling=False)
        parts.training.pool.close()
        compute = parts.compute
        for size in arguments.batch_size:
            if compute.compiled:
                torch.compiler.reset()  # it keeps code for a few shapes only
            timing = stages.inference_alone(
                config, parts, arguments.seconds, num_envs=size, batch_size=size
            )
            rows.append(
                {
                    "device": str(compute.device),
                    "threads": compute.threads,
                    "precision": str(compute.precision).removeprefix("torch."),
                    "batch": size,
                    "agent_steps_per_s": timing.per_s,
                    "batch_ms": 1000 / timing.rounds_per_s,
                }
            )
    return rows
