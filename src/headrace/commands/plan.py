"""`headrace plan`: what frames cost, which ratio of cores to accelerators is best, what limits."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from headrace.bench import end_to_end
from headrace.bench.plan import (
    ACCELERATOR,
    CORES,
    MeasuredRates,
    Outlook,
    Point,
    Prices,
    Rates,
    Transport,
    arrangements,
    measured_rates,
    outlook,
    read_json,
    read_transport,
    saving,
    together,
)
from headrace.bench.settings import PolicyArguments, cell, check_rates
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
    given: Rates = field(default_factory=Rates)
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


CUTS = {
    "central": "inference beside the learner (central, SEED)",
    "workers": "inference on workers (IMPALA)",
    "processors": "processors alone",
}


class Plan(NamedTuple):
    """All that is printed."""

    env_frames: float
    rates: Rates
    transport: Transport | None
    prices: Prices
    outlooks: list[Outlook]
    present: list[Point]  # one of each arrangement, if the present cores are known
    saving: float | None
    notes: list[str]


def plan_command(argv: list[str]) -> None:
    """Plans and prints."""
    arguments = tyro.cli(
        tyro.conf.OmitArgPrefixes[Arguments], args=argv, prog="headrace plan", description=HELP
    )
    plan = make_plan(arguments)
    if arguments.json:
        print(json.dumps(as_dict(plan)))
    else:
        show(plan)


def make_plan(arguments: Arguments) -> Plan:
    """Puts rates and prices together.

    Raises:
        ConfigError: rates or a price are missing, or flags do not fit each other.
    """
    machine, given = arguments.machine, arguments.given
    prices, transport = prices_of(machine), transport_of(arguments)
    accelerated = given.inference is not None or given.learner is not None
    if accelerated or (arguments.measures and arguments.measure.on_gpu()):
        check_accelerator_priced(machine)  # before minutes are spent
    if arguments.measures:
        measured = measure_now(arguments)
    else:
        measured = [measured_rates(read_json(path), path) for path in arguments.rates]
    rates = together(measured, given)
    accelerated = rates.inference is not None or rates.learner is not None
    if accelerated:
        check_accelerator_priced(machine)
    cores = machine.cores or (measured[0].cores if measured else None)
    outlooks = [
        outlook(
            each,
            rates,
            prices,
            servers=servers_of(each.accelerators, machine.accelerators),
            present_cores=cores,
            env_frames=arguments.frames,
        )
        for each in arrangements(rates, transport, apart=machine.apart)
    ]
    present = [p for each in outlooks for p in each.points if p.cores == cores]
    notes = []
    if not accelerated:
        notes.append(
            "no accelerator was measured, so none is planned: add --rates of a machine that has "
            "one, or --inference and --learner"
        )
    elif rates.inference_per_core is None:
        notes.append(
            "inference on workers is not known: add --rates of `headrace bench end-to-end "
            "--device cpu --json`, or --inference-per-core"
        )
    if transport is None:
        notes.append("what travels between machines is not counted: say --transport")
    return Plan(
        arguments.frames, rates, transport, prices, outlooks, present, saving(outlooks), notes
    )


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


def check_accelerator_priced(machine: MachineArguments) -> None:
    """Refuses to plan with an accelerator of unknown price.

    Raises:
        ConfigError: it is unknown.
    """
    if machine.price_per_accelerator_hour is None:
        raise ConfigError("say what an accelerator costs for an hour: --price-per-accelerator-hour")


def transport_of(arguments: Arguments) -> Transport | None:
    """Returns what travels; None if nothing was said of it.

    Raises:
        ConfigError: half of it is missing.
    """
    asked = arguments.transport
    flags = {
        "--transport-nbytes": asked.transport_nbytes,
        "--transport-per-s": asked.transport_per_s,
        "--transport-cores": asked.transport_cores,
    }
    if not asked.transport and set(flags.values()) == {None}:
        if asked.network_gbit_per_s is not None or arguments.machine.price_per_gigabyte:
            raise ConfigError(
                "a network matters only with what travels: give --transport, or --transport-nbytes"
            )
        return None
    found = read_transport(asked.transport) if asked.transport else (None, None, None)
    values = {
        name: file if flag is None else flag
        for (name, flag), file in zip(flags.items(), found, strict=True)
    }
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise ConfigError(f"what travels between machines lacks {' and '.join(missing)}")
    check_rates(**{"--network-gbit-per-s": asked.network_gbit_per_s}, **values)
    nbytes, per_s, cores = (float(value) for value in values.values() if value is not None)
    return Transport(nbytes, per_s, cores, asked.network_gbit_per_s)


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


def as_dict(plan: Plan) -> dict[str, Any]:
    """Returns what --json prints; rates and times as their names say, money as prices are."""
    return {
        "env_frames": plan.env_frames,
        "rates": dataclasses.asdict(plan.rates),
        "transport": plan.transport._asdict() if plan.transport else None,
        "prices": plan.prices._asdict(),
        "arrangements": {
            each.arrangement.name: {
                "balanced_cores_per_accelerator": each.balanced_ratio,
                "cheapest": _point(each.cheapest),
                "fastest": _point(each.fastest),
                "rows": [_point(point) for point in each.points],
            }
            for each in plan.outlooks
        },
        "present": [_point(point) for point in plan.present],
        "saving_of_central": plan.saving,
        "notes": plan.notes,
    }


def _point(point: Point) -> dict[str, Any]:
    return {**point._asdict(), "cores_per_accelerator": point.cores_per_accelerator}


def show(plan: Plan) -> None:
    """Prints a plan for people."""
    console = Console()
    console.print(rates_table(plan))
    present = {id(point) for point in plan.present}
    for each in plan.outlooks:
        console.print(table(each, plan.env_frames, present))
    for line in sentences(plan):
        print(line)


_OF_RATES = {
    "environment_per_core": "environments on one core, agent steps/s",
    "inference_per_core": "inference on one core, agent steps/s",
    "learner_per_core": "learner on one core, samples/s",
    "inference": "inference on an accelerator, agent steps/s",
    "learner": "learner on an accelerator, samples/s",
    "samples_per_agent_step": "samples per agent step",
    "frames_per_agent_step": "environment frames per agent step",
    "efficiency": "share of the stages' bound that runs reach",
}
_OF_TRANSPORT = {
    "agent_steps_per_s": "transport to one server, agent steps/s",
    "cores": "cores that this keeps busy, both ends",
    "nbytes_per_agent_step": "bytes per agent step, there and back",
    "gbit_per_s": "network of one server, Gbit/s",
}


def rates_table(plan: Plan) -> Table:
    """Returns what the plan was made from."""
    shown = Table(title="what each stage does alone")
    shown.add_column("")
    shown.add_column("", justify="right")
    for texts, values in ((_OF_RATES, plan.rates), (_OF_TRANSPORT, plan.transport)):
        for name, text in texts.items():
            if (value := getattr(values, name, None)) is not None:
                shown.add_row(text, cell(float(value)))
    return shown


def table(each: Outlook, env_frames: float, present: set[int]) -> Table:
    """Returns the rows of one arrangement; `present` has the ids of points at present cores."""
    title = f"{CUTS[each.arrangement.name]}: {_number(env_frames)} frames"
    shown = Table(
        title=title,
        caption="c cores + a accelerators, and the share of time they work",
        # In 80 columns a number is never cut: lines between columns would take three for each.
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    shown.add_column("")
    for name in ("c + a", "busy, %", "limits", "frames/s", "cost/h", "cost", "hours"):
        shown.add_column(name, justify="right", no_wrap=name != "limits")
    for point in each.points:
        devices = [share for name, share in point.busy.items() if name.startswith(ACCELERATOR)]
        shown.add_row(
            f"{_mark(each, point)} {'yours' if id(point) in present else ''}".strip(),
            f"{point.cores:g} + {point.accelerators}",
            "/".join(f"{100 * share:.0f}" for share in (point.busy[CORES], *devices)),
            point.limits,
            cell(point.env_frames_per_s),
            f"{point.cost_per_hour:,.2f}",
            f"{point.cost:,.2f}",
            f"{point.hours:,.1f}",
        )
    return shown


def _mark(each: Outlook, point: Point) -> str:
    if point is each.cheapest:
        return "best" if point is each.fastest else "cheapest"
    return "fastest" if point is each.fastest else ""


def _number(env_frames: float) -> str:
    return f"{env_frames:.6g}".replace("e+0", "e").replace("e+", "e")


def sentences(plan: Plan) -> list[str]:
    """Returns what the tables mean."""
    lines = []
    frames = f"{_number(plan.env_frames)} frames"
    for each in plan.outlooks:
        best, name = each.cheapest, CUTS[each.arrangement.name]
        if each.balanced_ratio is None:
            lines.append(
                f"{name}: {frames} cost {best.cost:,.2f} with any number of cores; most of their "
                f"time goes to {best.limits}"
            )
            continue
        lines.append(
            f"{name}: best at {each.balanced_ratio:,.1f} cores per accelerator, where {frames} "
            f"cost {best.cost:,.2f} and take {best.hours:,.1f} h; with more cores what limits is "
            f"{each.points[-1].limits}, with fewer {each.points[0].limits}"
        )
    for point in plan.present:
        if point.accelerators:
            best_cost = min(
                e.cheapest.cost for e in plan.outlooks if e.arrangement.name == point.arrangement
            )
            lines.append(
                f"with {point.cores:g} cores, as now, and {point.accelerators} accelerator"
                f"{'' if point.accelerators == 1 else 's'}, {CUTS[point.arrangement]}: "
                f"{point.cost:,.2f}, {point.cost / best_cost:.2f} times the best; what limits is "
                f"{point.limits}"
            )
    if plan.saving is not None:
        cheaper = "less" if plan.saving >= 0 else "more"
        lines.append(
            f"central inference costs {abs(plan.saving):.0%} {cheaper} than inference on workers, "
            "each at its best ratio"
        )
    return lines + [f"note: {note}" for note in plan.notes]
