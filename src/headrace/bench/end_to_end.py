"""Trains for real and measures it, then each stage alone: how much of the machine does a run reach?

Nothing is written and nothing evaluated; all else is the run's own code (`run.local`). The ceilings
follow in the same process, after the run, since they would take its time:

```
core-time     cores / (1/environment + 1/inference + s/learner)     each alone on one thread
accelerator   min(environment, 1 / (1/inference + s/learner))       environment on all cores
              1 / (1/environment + 1/inference + s/learner)         environment in torch, there too
```
s is samples through the gradient per agent step; the learner's rate alone is in samples/s.

The first is a bound whatever threads the run gives to a stage: several threads take no less core
time than one does. It is not one to be reached where a stage cannot be divided, as when one update
after the other is all there is to do on 16 cores. Code that was compiled for several threads is
compiled anew for one, which takes its time but is not measured.
"""

from __future__ import annotations

import dataclasses
import json
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from headrace.bench import stages
from headrace.bench.device_stages import device_environment
from headrace.bench.settings import (
    SMOKE_POLICY,
    OutputArguments,
    PolicyArguments,
    cell,
    check_positive,
    learning_settings,
    parsed,
    run_config,
)
from headrace.config import RunConfig, takes_turns
from headrace.learner.loop import Learner
from headrace.resources import usable_cores
from headrace.run.beside import more_threads
from headrace.run.build import Parts, network_name
from headrace.run.local import train_in_turns, train_overlapped
from headrace.run.pools import make_pool
from headrace.run.report import Reporter, Row
from headrace.run.system import keep_memory
from headrace.server.device_seat import DeviceSeat
from headrace.telemetry.metrics import EpisodeStats, Waits

_FIGURES = (
    *("env_frames_per_s", "agent_steps_per_s", "sampling_hz"),
    *("updates_per_s", "update_frame_rate_hz", "samples_used_share", "transmission_loss"),
    *("cpu_load", "cpu_load_machine", "gpu_load", "gpu_memory_gib"),
)
"""What is printed of the window's row, as `run.report` has it; null for what is not known here."""
_SHARES = {
    "samples_used_share": "samples used",
    "transmission_loss": "transmission loss",
    "cpu_load_machine": "processors busy",
    "gpu_load": "GPU busy",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Trains for real without writing anything, and prints its speed beside the ceilings.

    The ceilings are measured after it in the same process, each stage alone. Settings that are not
    flags are those of the environment's preset, but that a replay is learned from as soon as there
    is anything in it: nobody waits for --replay-min.
    """

    policy: PolicyArguments = field(default_factory=PolicyArguments)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Sets the arithmetic of the networks' torsos, as in a run."""
    num_envs: int | None = None
    """Trains in so many environments; None takes the preset's number."""
    inference_batch: int = 0
    """Answers so many environments at once; 0 takes half of them."""
    unroll_steps: int | None = None
    """Makes unrolls of so many agent steps; None takes the preset's number."""
    batch_unrolls: int | None = None
    """Makes an update of so many unrolls; None takes the preset's number."""
    spread_unrolls: bool = True
    """Lets environments end their unrolls at different steps, as in a run."""
    samples_per_insert: float | None = None
    """Samples a sequence of a replay so many times on average; None takes the preset's number."""
    env_threads: int = 0
    """Steps a native pool by so many threads; 0 takes one per core."""
    inference: Literal["auto", "server", "worker"] = "auto"
    """Says where the policy acts; auto takes the preset's choice."""
    pool: Literal["auto", "inline", "shm", "device"] = "auto"
    """Says where environments step, as in a run; device is beside the policy, all of them at
    once."""
    warmup_s: float = 10.0
    """Waits so many seconds from the first update until measuring begins; compiling comes before
    that."""
    seconds: float = 30.0
    """Measures the run for so many seconds."""
    ceiling_s: float = 4.0
    """Measures each ceiling for so many seconds."""
    output: OutputArguments = field(default_factory=OutputArguments)

    def __post_init__(self) -> None:
        check_positive(seconds=self.seconds, ceiling_s=self.ceiling_s)


SMOKE = Arguments(
    policy=SMOKE_POLICY,
    output=OutputArguments(smoke=True),
    num_envs=16,
    batch_unrolls=8,
    warmup_s=0.2,
    seconds=1.0,
    ceiling_s=0.2,
)


def run(argv: list[str]) -> None:
    """Measures what `argv` asks for and prints it."""
    arguments = parsed("end-to-end", argv, Arguments(), smoke=SMOKE)
    result = measure(arguments)
    if arguments.output.json:
        print(json.dumps(result))
    else:
        print_table(result)


class Ceiling(NamedTuple):
    """What the machine could do if no stage ever waited; all in agent steps/s."""

    model: Literal["core-time", "accelerator"]
    environment: float
    inference: float
    learner: float  # its samples/s, divided by samples per agent step
    combined: float


def ceiling_of(
    environment: float,
    inference: float,
    learner: float,
    *,
    samples_per_agent_step: float,
    cores: int | None,
) -> Ceiling:
    """Puts together what the stages do alone.

    Args:
        environment: agent steps/s; on one thread, or on all cores where `cores` is None.
        inference: agent steps/s.
        learner: samples/s.
        samples_per_agent_step: samples through the gradient per agent step.
        cores: that all stages share; None where inference and learner share an accelerator.
    """
    compute_s = 1 / inference + samples_per_agent_step / learner  # of one agent step
    steps = learner / samples_per_agent_step
    if cores is None:
        combined = min(environment, 1 / compute_s)
        return Ceiling("accelerator", environment, inference, steps, combined)
    return Ceiling(
        "core-time", environment, inference, steps, cores / (1 / environment + compute_s)
    )


class Window:
    """What `run.local` drives in place of a session: warms up, measures, and is over."""

    def __init__(
        self, parts: Parts, learner: Learner, waits: Waits, *, warmup_s: float, seconds: float
    ) -> None:
        self.parts, self.waits = parts, waits
        self._learner, self._warmup_s, self._seconds = learner, warmup_s, seconds
        self._reporter = Reporter(
            parts,
            learner,
            waits,
            EpisodeStats(),
            EpisodeStats(),
            interval_s=seconds,
            agent_steps=0,
            elapsed_s=time.monotonic,
        )
        self._since_s: float | None = None  # the first update, then the end of the warm-up
        self._steps_seen = -1  # agent steps at the newest update
        self._rows: list[Row] = []  # when measuring began, and when it ended

    def over(self) -> bool:
        """Whether both ends of the window are there."""
        return len(self._rows) == 2

    def enough(self) -> bool:
        """Never: the server goes on as long as the window is open."""
        return False

    def attend(self) -> None:
        """Has nothing else to do."""

    def learn(self, timeout_s: float) -> None:
        """Takes one update if a batch is there; the window begins and ends with an update.

        And with one that follows upon agent steps: where server and learner take turns, the window
        has whole turns of both then.
        """
        update = self._learner.learn(progress=0.0, timeout_s=timeout_s, waits=self.waits)
        if update is None:
            return
        now_s, steps = time.monotonic(), self.parts.source.agent_steps
        stepped, self._steps_seen = steps != self._steps_seen, steps
        due_s = self._seconds if self._rows else self._warmup_s
        if self._since_s is None:
            self._since_s = now_s
        elif stepped and now_s - self._since_s >= due_s:
            self._since_s = now_s
            self._rows.append(self._reporter.row(update))

    def row(self) -> Row:
        """Returns what was counted within the window."""
        return self._rows[1]

    def samples_per_agent_step(self) -> float:
        """Samples through the gradient per agent step, within the window."""
        first, last = self._rows
        samples = float(last["samples"]) - float(first["samples"])
        return samples / (float(last["agent_steps"]) - float(first["agent_steps"]))


def measure(arguments: Arguments) -> dict[str, Any]:
    """Trains, measures the ceilings, and returns what is printed."""
    num_envs = arguments.num_envs
    config = run_config(
        arguments.policy,
        server={
            "inference_batch": arguments.inference_batch,
            "spread_unrolls": arguments.spread_unrolls,
            **({} if num_envs is None else {"num_envs": num_envs}),
        },
        learning=learning_settings(
            arguments.policy.algorithm,
            unroll_steps=arguments.unroll_steps,
            batch_unrolls=arguments.batch_unrolls,
            samples_per_insert=arguments.samples_per_insert,
        ),
        precision=arguments.precision,
        env_threads=arguments.env_threads,
        inference=arguments.inference,
        pool=arguments.pool,
    )
    keep_memory()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        parts = stages.ready(config)
        stack.callback(parts.close)
        window = train(
            parts,
            turns=takes_turns(config),
            warmup_s=arguments.warmup_s,
            seconds=arguments.seconds,
        )
        parts.close()  # its threads or workers would take the ceilings' time
        alone = parts
        if config.inference == "worker":  # what acts there is measured here
            alone = stages.ready(dataclasses.replace(config, inference="server"))
            alone.close()
        torch.set_num_threads(1)
        ceiling = measure_ceiling(
            config,
            alone,
            samples_per_agent_step=window.samples_per_agent_step(),
            seconds=arguments.ceiling_s,
        )
    return result_of(config, parts, window, ceiling)


def train(parts: Parts, *, turns: bool, warmup_s: float, seconds: float) -> Window:
    """Trains in the run's own threads, or in turns as it would, until the window is measured."""
    waits = Waits()
    learner = Learner(parts.algorithm, parts.feed, parts.weights, device=parts.compute.device)
    window = Window(parts, learner, waits, warmup_s=warmup_s, seconds=seconds)
    with more_threads(parts):
        (train_in_turns if turns else train_overlapped)(window)
    learner.ensure_finite()
    return window


def measure_ceiling(
    config: RunConfig, parts: Parts, *, samples_per_agent_step: float, seconds: float
) -> Ceiling:
    """Measures each stage alone, with the weights and the batch sizes of the run."""
    on_gpu = parts.compute.device.type == "cuda"
    num_envs = config.server.num_envs
    alone = dataclasses.replace(config, env_threads=usable_cores() if on_gpu else 1)
    if isinstance(parts.source, DeviceSeat):
        device = parts.compute.acting
        environment = stages.timed(device_environment(config, device), seconds, device)
    else:
        batch = parts.training.pool.max_batch
        pool = make_pool(alone, num_envs=num_envs, batch_size=batch, seed=config.seed)
        try:
            environment, _ = stages.environment_alone(pool, seconds)
        finally:
            pool.close()
    beside = on_gpu and isinstance(parts.source, DeviceSeat)  # all three share the GPU
    ceiling = ceiling_of(
        environment.per_s,
        stages.inference_alone(config, parts, seconds, num_envs=num_envs).per_s,
        stages.learner_alone(config, parts, seconds, num_envs=num_envs).per_s,
        samples_per_agent_step=samples_per_agent_step,
        cores=(1 if beside else None) if on_gpu else usable_cores(),
    )
    return ceiling._replace(model="accelerator") if beside else ceiling


def result_of(config: RunConfig, parts: Parts, window: Window, ceiling: Ceiling) -> dict[str, Any]:
    """Returns what is printed; rates are per second of wall clock."""
    row, compute = window.row(), parts.compute
    env_threads = min(config.env_threads or usable_cores(), config.server.num_envs)
    return {
        "env": config.env,
        "algorithm": config.algorithm,
        "network": network_name(config, parts.spec),
        "precision": row["precision"],
        "compiled": compute.compiled,
        "device": str(compute.device),
        "cores": usable_cores(),
        "threads": {"compute": compute.threads, "environment": env_threads},
        "num_envs": config.server.num_envs,
        "inference": config.inference,
        "pool": config.pool,
        **{name: row.get(name) for name in _FIGURES},
        "samples_per_agent_step": window.samples_per_agent_step(),
        "policy_lag_mean": row.get("policy_lag_mean"),  # a replay's is its age
        "replay_age_updates": row.get("replay_age_updates"),
        "wait": {name: row[name] for name in row if name.startswith("wait/")},
        "bottleneck": row["bottleneck"],
        "ceiling": ceiling._asdict(),
        "share_of_ceiling": float(row["agent_steps_per_s"]) / ceiling.combined,
    }


def print_table(result: dict[str, Any]) -> None:
    """Prints a result for people."""
    ceiling, threads = result["ceiling"], result["threads"]
    table = Table(
        title=f"{result['env']}, {result['network']}, {result['precision']} on {result['device']}",
        caption=f"{result['cores']} cores; threads: {threads['compute']} a compute stage, "
        f"{threads['environment']} for environments",
    )
    table.add_column("")
    table.add_column("", justify="right")
    for name in ("env_frames", "agent_steps", "updates"):
        table.add_row(f"{name.replace('_', ' ')}/s", cell(result[f"{name}_per_s"]))
    table.add_row("samples learned/s (update frame rate)", cell(result["update_frame_rate_hz"]))
    table.add_row("samples per agent step", cell(result["samples_per_agent_step"]))
    for name, text in _SHARES.items():
        if result[name] is not None:
            table.add_row(text, f"{result[name]:.1%}")
    if result["cpu_load"] is not None:
        table.add_row("processor cores used", cell(result["cpu_load"]))
    for name, text in (("policy_lag_mean", "policy lag"), ("replay_age_updates", "age")):
        if result[name] is not None:
            table.add_row(f"{text}, updates", cell(result[name]))
    for name, share in result["wait"].items():
        table.add_row(name.removeprefix("wait/").replace("_for_", " waits for "), f"{share:.0%}")
    table.add_row("stage that limits", result["bottleneck"], end_section=True)
    for name in ("environment", "inference", "learner", "combined"):
        table.add_row(f"ceiling, {name}: agent steps/s", cell(ceiling[name]))
    table.add_row(f"share of ceiling ({ceiling['model']})", f"{result['share_of_ceiling']:.0%}")
    Console().print(table)
