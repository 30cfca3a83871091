"""One row of metrics as a panel for a terminal, readable from 80 columns and 24 lines up."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from headrace.algorithms.base import Shown
from headrace.length import Length
from headrace.telemetry.wording import (
    MISSING,
    Row,
    clock,
    fixed,
    number,
    pair,
    plain,
    share,
    short,
    some,
)

_WIDEST_COLUMNS = 100  # wider, the eye loses the line from a label to its number
_STAGE_WAITS = (
    ("server for environments", "wait/server_for_environments"),
    ("server for free slots", "wait/server_for_slots"),
    ("learner for unrolls", "wait/learner_for_unrolls"),
)

_SPEEDS = (
    ("env frames", "env_frames", "env_frames_per_s"),
    ("agent steps", "agent_steps", "sampling_hz"),
    ("updates", "updates", "updates_per_s"),
    ("samples learned", "samples", "update_frame_rate_hz"),
)


def render(
    title: str, row: Row, length: Length, eta_s: float, shown: Sequence[Shown]
) -> RenderableType:
    """Draws one row as a panel; `shown` are the metrics of what learns."""
    columns = Table.grid(expand=True, padding=(0, 2))
    columns.add_column(ratio=1)
    columns.add_column(ratio=1)
    columns.add_row(_throughput(row), _episodes(row))
    columns.add_row("", "")
    columns.add_row(_learning(row, shown), _run(row))
    precision = row.get("precision", MISSING)
    panel = Panel(
        Group(_progress_line(row, length, eta_s), "", columns, "", _pipeline(row)),
        title=Text(f" headrace  {title} ", style="bold"),
        title_align="left",
        subtitle=Text(f" {precision}  {clock(number(row, 'elapsed_s'))} ", style="dim"),
        subtitle_align="right",
        box=box.ROUNDED,
        border_style="cyan",
        padding=(0, 1),
    )
    return Constrain(panel, _WIDEST_COLUMNS)


def done(row: Row, length: Length) -> float:
    """Returns the share of the run that is done."""
    return length.progress(number(row, "env_frames"), number(row, "elapsed_s"))


def far(row: Row, length: Length, of: str) -> str:
    """Says how far the run is of what ends it: frames, or minutes where they are ahead."""
    frames = number(row, "env_frames")
    elapsed_s = number(row, "elapsed_s")
    if length.share_of_minutes(elapsed_s) > frames / length.total_frames:
        whole = clock(60 * (length.total_minutes or 0))
        return f"{clock(elapsed_s)}{of}{whole}, {short(frames)} frames"
    return f"{short(frames)}{of}{short(length.total_frames)} frames"


def _progress_line(row: Row, length: Length, eta_s: float) -> Table:
    part = done(row, length)
    line = Table.grid(expand=True, padding=(0, 2, 0, 0))
    line.add_column(justify="right", style="bold cyan", no_wrap=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True)
    line.add_column(justify="right", no_wrap=True)
    line.add_row(
        share(part),
        _bar(part, "cyan"),
        far(row, length, " of "),
        Text.assemble(("ETA ", "dim"), (clock(eta_s), "bold")),
    )
    return line


def _throughput(row: Row) -> Table:
    table = _section("Throughput", "total", "per second")
    for label, total, rate in _SPEEDS:
        per_s = Text(short(number(row, rate)), style="bold")
        table.add_row(label, short(number(row, total)), per_s)
    return table


def _episodes(row: Row) -> Table:
    """Training's episodes, of which the mean is over the last 100, beside those of an evaluation.

    An evaluator plays with weights of a moment ago, so that their step is worth a line.
    """
    evaluated = "eval_return_mean" in row
    table = _section("Episodes", "training", *(("evaluation",) if evaluated else ()))
    lines = [("mean return", plain, "return_mean", "eval_return_mean", "bold green")]
    if "eval_return_min" in row:
        lines.append(("lowest", plain, "return_min", "eval_return_min", ""))
    lines.append(("best", plain, "return_max", "eval_return_max", ""))
    lines.append(("episodes", short, "episodes", "eval_episodes", ""))
    if "eval_agent_steps" in row:
        lines.append(("at agent step", short, "agent_steps", "eval_agent_steps", ""))
    else:
        lines.append(("steps, mean", short, "length_mean", "eval_length_mean", ""))
    for label, wording, training, evaluation, style in lines:
        names = (training, evaluation) if evaluated else (training,)
        table.add_row(label, *(Text(wording(number(row, name)), style=style) for name in names))
    return table


def _learning(row: Row, shown: Sequence[Shown]) -> Table:
    table = _section("Learning", "")
    for label, name in shown:
        table.add_row(label, plain(number(row, name)))
    return table


def _run(row: Row) -> Table:
    table = _section("Run", "")
    if "replay_sequences" in row:
        table.add_row("sequences in the replay", short(number(row, "replay_sequences")))
        table.add_row("samples per insert", plain(number(row, "samples_per_insert")))
    else:
        lag = pair(number(row, "policy_lag_mean"), number(row, "policy_lag_max"))
        table.add_row("policy lag, mean / max", lag)
    used, lost = (100 * number(row, name) for name in ("samples_used_share", "transmission_loss"))
    table.add_row("samples used / lost, %", pair(used, lost))
    turnaround = (number(row, f"server_turnaround_ms_{name}") for name in ("p50", "p99"))
    table.add_row("server ms, p50 / p99", pair(*turnaround))
    table.add_row("processor cores used", fixed(number(row, "cpu_load")))
    for who in ("worker", "evaluator", "viewer"):
        deaths = some(number(row, f"{who}_deaths"))
        if deaths != MISSING:
            table.add_row(f"{who} deaths", Text(deaths, style="bold red"))
    return table


def _pipeline(row: Row) -> Table:
    """What waits, and what is busy: the machine's processors, whoever keeps them so, and GPUs."""
    table = Table.grid(expand=True, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(justify="right", no_wrap=True, min_width=6)
    bottleneck = str(row.get("bottleneck", MISSING))
    table.add_row(
        Text("Waiting", style="cyan"),
        Text.assemble(("bottleneck ", "dim"), (bottleneck, "bold yellow")),
        Text("share", style="dim"),
    )
    for label, name in _STAGE_WAITS:
        waited = number(row, name)
        table.add_row(label, _bar(waited, "yellow"), share(waited))
    busy = number(row, "cpu_load_machine")
    table.add_row(Text("Processors busy", style="cyan"), _bar(busy, "green"), share(busy))
    if "gpu_memory_gib" in row:
        held = f", {fixed(number(row, 'gpu_memory_gib'))} GiB"
        busy = number(row, "gpu_load")
        gpu = Text.assemble(("GPU busy", "cyan"), held)
        table.add_row(gpu, _bar(busy, "green"), share(busy))
    return table


def _section(title: str, *columns: str) -> Table:
    table = Table(box=None, expand=True, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(title, header_style="cyan", no_wrap=True, ratio=1)
    for column in columns:
        table.add_column(column, header_style="dim", justify="right", no_wrap=True)
    return table


def _bar(part: float, style: str) -> ProgressBar:
    completed = min(max(part, 0.0), 1.0) if math.isfinite(part) else 0.0
    return ProgressBar(1.0, completed, complete_style=style, finished_style=style)
