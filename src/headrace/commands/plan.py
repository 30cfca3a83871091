"""`headrace plan`: what frames cost, which ratio of cores to accelerators is best, what limits."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import tyro

from headrace.bench import end_to_end
from headrace.bench.plan import (
    Prices,
    Transport,
    arrangements,
    check_rates,
    outlook,
    saving,
)
from headrace.bench.plan_rates import (
    GivenRates,
    MeasuredRates,
    measured_rates,
    read_measured,
    read_transport,
    together,
)
from headrace.bench.settings import PolicyArguments
from headrace.commands.plan_report import Plan, as_dict, show
from headrace.errors import ConfigError

HELP = """Says what frames cost, from what each stage does alone and what your machines cost.

    headrace plan --rates FILE.json … --price-per-core-hour P --price-per-accelerator-hour Q
    headrace plan ENV …                  measures this machine now, for some seconds
    headrace plan --environment-per-core 900 --inference 4e4 --learner 6e4 …

  FILE.json is what `headrace bench end-to-end --env ENV --json` printed on a machine
  like yours. With a GPU it gives the rates of an accelerator, with --device cpu
  those of a core. Give both to compare central inference (SEED) with inference
  on workers (IMPALA). Flags go over files. Money is whatever money you mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineArguments:
    """What is paid for."""

    price_per_core_hour: float | None = None
    """Says what one core costs for an hour; it must be given."""
    price_per_accelerator_hour: float | None = None
    """Says what one accelerator costs for an hour; it must be given where there is one."""
    price_per_gigabyte: float = 0.0
    """Says what 1e9 bytes between machines cost."""
    cores: float | None = None
    """Says how many cores you have now, all together; None takes those of the machine that was
    measured."""
    accelerators: int | None = None
    """Says how many accelerators you have now or want; None takes as many as one server needs."""
    apart: bool = False
    """Gives central inference an accelerator of its own beside each learner's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransportArguments:
    """What travels between machines; nothing does unless it is said here."""

    transport: str = ""
    """Names a file that `headrace bench wire --json` printed, or `headrace bench pools --pool grpc
    --json`, which does not know the cores: bytes, agent steps/s, cores."""
    transport_nbytes: float | None = None
    """Says how many bytes travel for one agent step, there and back."""
    transport_per_s: float | None = None
    """Says how many agent steps/s one server can take from worker hosts."""
    transport_cores: float | None = None
    """Says how many cores both ends together keep busy with that."""
    network_gbit_per_s: float | None = None
    """Says how many gigabits/s one server's network carries; None means more than enough."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureArguments:
    """How `headrace plan ENV` measures; other settings are those of the preset."""

    algorithm: str = "impala"
    """Names the learning rule."""
    preset: str | None = None
    """Names another preset of that rule; None takes the environment's."""
    device: str = "auto"
    """Says where networks are measured: cpu, cuda, cuda:N, or auto. A GPU is measured, and then the
    cores without it."""
    num_envs: int | None = None
    """Steps so many environments; None takes what `headrace bench end-to-end` takes."""
    seconds: float = 20.0
    """Measures the run for so many seconds; the stages alone take half as long together."""
    smoke: bool = False
    """Measures everything for a moment, on catch unless ENV is given; the numbers mean nothing."""

    def on_gpu(self) -> bool:
        """Whether a GPU will be measured."""
        return self.device.startswith("cuda") or (
            self.device == "auto" and torch.cuda.is_available()
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """What is known, and what machines cost."""

    env: Annotated[str, tyro.conf.Positional] = ""
    """Names the environment to measure now; leave it out where --rates or flags say the rates."""
    frames: float = 1e9
    """Says how many environment frames are wanted, such as 1e9."""
    rates: tuple[str, ...] = ()
    """Names files of `headrace bench end-to-end --json`; what the first one has counts."""
    machine: MachineArguments = field(default_factory=MachineArguments)
    given: GivenRates = field(default_factory=GivenRates)
    transport: TransportArguments = field(default_factory=TransportArguments)
    measure: MeasureArguments = field(default_factory=MeasureArguments)
    json: bool = False
    """Prints one JSON object and nothing else."""

    def __post_init__(self) -> None:
        check_rates(
            **{
                "--frames": self.frames,
                "--seconds": self.measure.seconds,
                "--cores": self.machine.cores,
                "--accelerators": self.machine.accelerators,
            }
        )
        if self.env and self.rates:
            raise ConfigError("name an environment to measure, or --rates with files, not both")

    @property
    def measures(self) -> bool:
        """Whether this machine is measured now."""
        return bool(self.env) or (self.measure.smoke and not self.rates)


def plan_command(argv: list[str]) -> None:
    """Plans and prints."""
    arguments = tyro.cli(
        tyro.conf.OmitArgPrefixes[Arguments], args=argv, prog="headrace plan", description=HELP
    )
    prices = prices_of(arguments.machine)
    transport = transport_of(arguments)
    plan = make_plan(arguments, prices, transport)
    if arguments.json:
        print(json.dumps(as_dict(plan)))
    else:
        show(plan)


def prices_of(machine: MachineArguments) -> Prices:
    """Returns the prices.

    Raises:
        ConfigError: that of a core is missing, or one is negative.
    """
    for name in ("price_per_core_hour", "price_per_accelerator_hour", "price_per_gigabyte"):
        price = getattr(machine, name)
        if price is not None and not 0 <= price < float("inf"):
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} must be 0 or more, not {price:g}")
    if machine.price_per_core_hour is None:
        raise ConfigError("say what a core costs for an hour: --price-per-core-hour")
    return Prices(
        per_core_hour=machine.price_per_core_hour,
        per_accelerator_hour=machine.price_per_accelerator_hour or 0.0,
        per_gigabyte=machine.price_per_gigabyte,
    )


def transport_of(arguments: Arguments) -> Transport | None:
    """Returns what travels; None if nothing was said of it.

    Raises:
        ConfigError: half of it is missing.
    """
    asked = arguments.transport
    flags = (asked.transport_nbytes, asked.transport_per_s, asked.transport_cores)
    if not asked.transport and flags == (None, None, None):
        if asked.network_gbit_per_s is not None or arguments.machine.price_per_gigabyte:
            raise ConfigError(
                "a network matters only with what travels: give --transport, or --transport-nbytes"
            )
        return None
    found = read_transport(asked.transport) if asked.transport else (None, None, None)
    values = [file if flag is None else flag for flag, file in zip(flags, found, strict=True)]
    names = ("--transport-nbytes", "--transport-per-s", "--transport-cores")
    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if missing:
        raise ConfigError(f"what travels between machines lacks {' and '.join(missing)}")
    check_rates(**{"--network-gbit-per-s": asked.network_gbit_per_s})
    check_rates(**dict(zip(names, values, strict=True)))
    nbytes, per_s, cores = (float(value) for value in values if value is not None)
    return Transport(
        nbytes_per_agent_step=nbytes,
        agent_steps_per_s=per_s,
        cores=cores,
        gbit_per_s=asked.network_gbit_per_s,
    )


def make_plan(arguments: Arguments, prices: Prices, transport: Transport | None) -> Plan:
    """Puts rates and prices together.

    Raises:
        ConfigError: rates or a price are missing.
    """
    machine, notes = arguments.machine, []
    given = arguments.given.inference is not None or arguments.given.learner is not None
    if given or (arguments.measures and arguments.measure.on_gpu()):
        check_accelerator_priced(machine)  # before minutes are spent
    measured = [read_measured(path) for path in arguments.rates]
    if arguments.measures:
        measured = measure_now(arguments)
    rates, measured_cores = together(measured, arguments.given)
    cores = machine.cores or measured_cores
    if rates.inference is None and rates.learner is None:
        notes.append(
            "no accelerator was measured, so none is planned: add --rates of a machine that has "
            "one, or --inference and --learner"
        )
    else:
        check_accelerator_priced(machine)
        if rates.inference_per_core is None:
            notes.append(
                "inference on workers is not known: add --rates of `headrace bench end-to-end "
                "--device cpu --json`, or --inference-per-core"
            )
    if transport is None:
        notes.append("what travels between machines is not counted: say --transport")
    found = arrangements(rates, transport, apart=machine.apart)
    if not found:
        raise ConfigError(
            "two stages are not known: give --rates, or --inference and --learner, or "
            "--inference-per-core and --learner-per-core"
        )
    outlooks = [
        outlook(
            each,
            rates,
            prices,
            servers=servers_of(each.accelerators, machine.accelerators),
            present_cores=cores,
            env_frames=arguments.frames,
        )
        for each in found
    ]
    present = [p for each in outlooks for p in each.points if p.cores == cores]
    return Plan(
        arguments.frames, rates, transport, prices, outlooks, present, saving(outlooks), notes
    )


def check_accelerator_priced(machine: MachineArguments) -> None:
    """Refuses to plan with an accelerator of unknown price.

    Raises:
        ConfigError: it is unknown.
    """
    if machine.price_per_accelerator_hour is None:
        raise ConfigError("say what an accelerator costs for an hour: --price-per-accelerator-hour")


def servers_of(accelerators_each: int, accelerators: int | None) -> int:
    """Returns how many servers so many accelerators make.

    Raises:
        ConfigError: some would be left over.
    """
    if accelerators is None or not accelerators_each:
        return 1
    if accelerators % accelerators_each:
        raise ConfigError(
            f"with --apart each server has {accelerators_each} accelerators, and "
            f"--accelerators {accelerators} leaves one over"
        )
    return accelerators // accelerators_each


def measure_now(arguments: Arguments) -> list[MeasuredRates]:
    """Measures this machine; one with a GPU a second time without it."""
    asked = arguments.measure

    def measured(device: str) -> dict[str, Any]:
        policy = PolicyArguments(
            env=arguments.env or "catch",
            algorithm=asked.algorithm,
            preset=asked.preset,
            device=device,
        )
        if asked.smoke:
            return end_to_end.measure(dataclasses.replace(end_to_end.SMOKE, policy=policy))
        print(
            f"measuring {policy.env} on {device} for {asked.seconds:g} s",
            file=sys.stderr,
            flush=True,
        )
        return end_to_end.measure(
            end_to_end.Arguments(
                policy=policy,
                num_envs=asked.num_envs,
                seconds=asked.seconds,
                warmup_s=asked.seconds / 4,
                ceiling_s=asked.seconds / 6,
            )
        )

    results = [measured(asked.device)]
    if results[0]["ceiling"]["model"] == "accelerator":
        results.append(measured("cpu"))
    return [measured_rates(result, "the measurement") for result in results]
