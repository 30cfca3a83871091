"""What `headrace plan` prints: tables for people, one object with --json."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from headrace.bench.plan import ACCELERATOR, CORES, Outlook, Point, Prices, Rates, Transport
from headrace.bench.settings import cell

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


def as_dict(plan: Plan) -> dict[str, Any]:
    """Returns what --json prints; rates and times as their names say, money as prices are."""
    return {
        "env_frames": plan.env_frames,
        "rates": dataclasses.asdict(plan.rates),
        "transport": dataclasses.asdict(plan.transport) if plan.transport else None,
        "prices": dataclasses.asdict(plan.prices),
        "arrangements": {
            each.name: {
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


def rates_table(plan: Plan) -> Table:
    """Returns what the plan was made from."""
    rates, transport = plan.rates, plan.transport
    shown = Table(title="what each stage does alone")
    shown.add_column("")
    shown.add_column("", justify="right")
    rows: list[tuple[str, float | None]] = [
        ("environments on one core, agent steps/s", rates.environment_per_core),
        ("inference on one core, agent steps/s", rates.inference_per_core),
        ("learner on one core, samples/s", rates.learner_per_core),
        ("inference on an accelerator, agent steps/s", rates.inference),
        ("learner on an accelerator, samples/s", rates.learner),
        ("samples per agent step", rates.samples_per_agent_step),
        ("environment frames per agent step", rates.frames_per_agent_step),
        ("share of the stages' bound that runs reach", rates.efficiency),
    ]
    if transport is not None:
        rows += [
            ("transport to one server, agent steps/s", transport.agent_steps_per_s),
            ("cores that this keeps busy, both ends", transport.cores),
            ("bytes per agent step, there and back", transport.nbytes_per_agent_step),
            ("network of one server, Gbit/s", transport.gbit_per_s),
        ]
    for name, value in rows:
        if value is not None:
            shown.add_row(name, cell(float(value)))
    return shown


def table(each: Outlook, env_frames: float, present: set[int]) -> Table:
    """Returns the rows of one arrangement; `present` has the ids of points at present cores."""
    title = f"{CUTS[each.name]}: {_number(env_frames)} frames"
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
        best, name = each.cheapest, CUTS[each.name]
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
            best_cost = next(e.cheapest.cost for e in plan.outlooks if e.name == point.arrangement)
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
