"""What a user sees while a run trains: a live table in a terminal, short lines anywhere else.

Everything is drawn by the caller's thread inside `update`, at most once per interval: a drawing
thread would hold the interpreter's lock against the threads that train.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import monotonic
from typing import Protocol, TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Row = Mapping[str, float | int | str]
"""One report of the run, by name; names that are missing are shown as a dash."""

_MISSING = "\N{EN DASH}"
_LIVE_INTERVAL_S = 1.0
_WIDEST_COLUMNS = 100  # wider, the eye loses the line from a label to its number
_STAGE_WAITS = (
    ("server for environments", "wait/server_for_environments"),
    ("server for free slots", "wait/server_for_slots"),
    ("learner for unrolls", "wait/learner_for_unrolls"),
)


_OF_A_POLICY = (
    ("policy loss", "loss/policy"),
    ("value loss", "loss/value"),
    ("entropy, nats", "loss/entropy"),
)
_OF_VALUES = (
    ("loss", "loss/total"),
    ("TD error", "loss/td_error_mean"),
    ("value", "value_mean"),
)


class Display(Protocol):
    """Where progress is shown."""

    def update(self, row: Row) -> None:
        """Shows a row, unless one was shown a moment ago."""

    def message(self, text: str) -> None:
        """Shows a line that stays."""


@contextmanager
def open_display(
    total_env_frames: int,
    title: str,
    *,
    stream: TextIO | None = None,
    live: bool | None = None,
    plain_interval_s: float = 5.0,
    now_s: Callable[[], float] = monotonic,
) -> Iterator[Display]:
    """Shows the progress of a run for as long as the block runs; the last row is always shown.

    Args:
        total_env_frames: where the run ends.
        title: what is trained, in a few words.
        stream: where to write; standard output by default.
        live: a table that redraws itself (True) or plain lines (False); by default a table where
            `stream` is a terminal that can redraw and show it.
        plain_interval_s: shortest time between two plain lines.
        now_s: monotonic clock in seconds.
    """
    stream = stream or sys.stdout
    console = Console(file=stream, highlight=False, force_terminal=live)
    if live is None:
        live = console.is_terminal and not console.is_dumb_terminal and not _is_ascii(console)
    progress = _Progress(total_env_frames, now_s)
    display: _LiveDisplay | _PlainDisplay
    if not live:
        display = _PlainDisplay(stream, title, progress, plain_interval_s)
        try:
            yield display
        finally:
            display.draw()
        return
    with Live(console=console, auto_refresh=False) as region:
        display = _LiveDisplay(region, title, progress)
        try:
            yield display
        finally:
            display.draw()


def _is_ascii(console: Console) -> bool:
    return not console.encoding.lower().startswith("utf")


class _Progress:
    """Time: when something was shown last, and how long the rest will take."""

    def __init__(self, total_env_frames: int, now_s: Callable[[], float]) -> None:
        self.total_env_frames = total_env_frames
        self._now_s = now_s
        self._shown_s = -math.inf
        self._first: tuple[float, float] | None = None  # (clock, env_frames) of the first row

    def is_due(self, interval_s: float) -> bool:
        """Says whether it is time to show something, and if so starts the next interval."""
        now_s = self._now_s()
        if now_s - self._shown_s < interval_s:
            return False
        self._shown_s = now_s
        return True

    def eta_s(self, row: Row) -> float:
        """Seconds that the rest takes at the mean pace since the first row; NaN while unknown.

        The first row may be that of a resumed run, so frames and time count from there; with that
        row alone, the rate that it reports is all there is.
        """
        env_frames, now_s = _number(row, "env_frames"), self._now_s()
        if self._first is None:
            self._first = (now_s, env_frames)
        first_s, first_frames = self._first
        pace = _number(row, "env_frames_per_s")
        if now_s > first_s and env_frames > first_frames:
            pace = (env_frames - first_frames) / (now_s - first_s)
        return max(0.0, self.total_env_frames - env_frames) / pace if pace > 0 else math.nan


class _PlainDisplay:
    """One short ASCII line per update, for files, pipes and CI."""

    def __init__(self, stream: TextIO, title: str, progress: _Progress, interval_s: float) -> None:
        self._stream = stream
        self._progress = progress
        self._interval_s = interval_s
        self._line = ""
        self.message(title)

    def update(self, row: Row) -> None:
        self._line = plain_line(row, self._progress.total_env_frames, self._progress.eta_s(row))
        if self._progress.is_due(self._interval_s):
            self.draw()

    def draw(self) -> None:
        """Writes the newest line if it was not written yet."""
        if self._line:
            self.message(self._line)
        self._line = ""

    def message(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        self._stream.flush()


class _LiveDisplay:
    """A table that redraws itself in place."""

    def __init__(self, region: Live, title: str, progress: _Progress) -> None:
        self._region = region
        self._title = title
        self._progress = progress
        self._row: Row = {}
        self._eta_s = math.nan

    def update(self, row: Row) -> None:
        self._row, self._eta_s = row, self._progress.eta_s(row)
        if self._progress.is_due(_LIVE_INTERVAL_S):
            self.draw()

    def draw(self) -> None:
        """Draws the newest row."""
        if not self._row:
            return
        table = render(self._title, self._row, self._progress.total_env_frames, self._eta_s)
        self._region.update(table, refresh=True)

    def message(self, text: str) -> None:
        self._region.console.print(text, markup=False)


def plain_line(row: Row, total_env_frames: int, eta_s: float) -> str:
    """Says in one line how far the run is and how well it does; leaves out what is not known."""
    frames = _number(row, "env_frames")
    parts = [
        f"{_short(frames)}/{_short(total_env_frames)} frames ({_share(frames, total_env_frames)})"
    ]
    for pattern, value in (
        ("{} frames/s", _short(_number(row, "env_frames_per_s"))),
        ("eta {}", _clock(eta_s)),
        ("return {}", _plain(_number(row, "return_mean"))),
        ("best {}", _plain(_number(row, "return_max"))),
        ("episodes {}", _short(_number(row, "episodes"))),
        ("loss {}", _plain(_number(row, "loss/policy"))),
        ("TD error {}", _plain(_number(row, "loss/td_error_mean"))),
        ("lag {}", _plain(_number(row, "policy_lag_mean"))),
        ("replay {}", _short(_number(row, "replay_sequences"))),
        ("worker deaths {}", _some(_number(row, "worker_deaths"))),
        ("bottleneck {}", str(row.get("bottleneck", _MISSING))),
    ):
        if value != _MISSING:
            parts.append(pattern.format(value))
    return "  ".join(parts).replace(_MISSING, "-")


def render(title: str, row: Row, total_env_frames: int, eta_s: float) -> RenderableType:
    """Draws one row as a panel, readable from 80 columns up."""
    columns = Table.grid(expand=True, padding=(0, 2))
    columns.add_column(ratio=1)
    columns.add_column(ratio=1)
    columns.add_row(_throughput(row), _episodes(row))
    columns.add_row("", "")
    columns.add_row(_learning(row), _lag(row))
    precision = row.get("precision", _MISSING)
    panel = Panel(
        Group(_progress_line(row, total_env_frames, eta_s), "", columns, "", _pipeline(row)),
        title=Text(f" headrace  {title} ", style="bold"),
        title_align="left",
        subtitle=Text(f" {precision}  {_clock(_number(row, 'elapsed_s'))} ", style="dim"),
        subtitle_align="right",
        box=box.ROUNDED,
        border_style="cyan",
        padding=(0, 1),
    )
    return Constrain(panel, _WIDEST_COLUMNS)


def _progress_line(row: Row, total_env_frames: int, eta_s: float) -> Table:
    frames = _number(row, "env_frames")
    line = Table.grid(expand=True, padding=(0, 2, 0, 0))
    line.add_column(justify="right", style="bold cyan", no_wrap=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True)
    line.add_column(justify="right", no_wrap=True)
    line.add_row(
        _share(frames, total_env_frames),
        _bar(frames / total_env_frames if total_env_frames else math.nan, "cyan"),
        f"{_short(frames)} of {_short(total_env_frames)} frames",
        Text.assemble(("ETA ", "dim"), (_clock(eta_s), "bold")),
    )
    return line


def _throughput(row: Row) -> Table:
    table = _section("Throughput", "total", "per second")
    for name in ("env_frames", "agent_steps", "updates"):
        rate = Text(_short(_number(row, f"{name}_per_s")), style="bold")
        table.add_row(name.replace("_", " "), _short(_number(row, name)), rate)
    return table


def _episodes(row: Row) -> Table:
    table = _section("Episodes", "return")
    mean = Text(_plain(_number(row, "return_mean")), style="bold green")
    table.add_row("mean of last 100", mean)
    table.add_row("best", _plain(_number(row, "return_max")))
    table.add_row("evaluation", _plain(_number(row, "eval_return_mean")))
    return table


def _learning(row: Row) -> Table:
    table = _section("Learning", "")
    of_rule = _OF_VALUES if "replay_sequences" in row else _OF_A_POLICY
    for label, name in (
        *of_rule,
        ("gradient norm", "gradient_norm"),
        ("learning rate", "learning_rate"),
    ):
        table.add_row(label, _plain(_number(row, name)))
    return table


def _lag(row: Row) -> Table:
    table = _section("Run", "")
    table.add_row("episodes", _short(_number(row, "episodes")))
    table.add_row("steps per episode", _short(_number(row, "length_mean")))
    if "replay_sequences" in row:
        table.add_row("sequences in the replay", _short(_number(row, "replay_sequences")))
        table.add_row("samples per insert", _plain(_number(row, "samples_per_insert")))
    else:
        table.add_row("policy lag, mean / max", _pair(row, "policy_lag_mean", "policy_lag_max"))
    turnaround = _pair(row, "server_turnaround_ms_p50", "server_turnaround_ms_p99")
    table.add_row("server ms, p50 / p99", turnaround)
    deaths = _some(_number(row, "worker_deaths"))
    if deaths != _MISSING:
        table.add_row("worker deaths", Text(deaths, style="bold red"))
    return table


def _pipeline(row: Row) -> Table:
    table = Table.grid(expand=True, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(justify="right", no_wrap=True, min_width=6)
    bottleneck = str(row.get("bottleneck", _MISSING))
    table.add_row(
        Text("Waiting", style="cyan"),
        Text.assemble(("bottleneck ", "dim"), (bottleneck, "bold yellow")),
        Text("share", style="dim"),
    )
    for label, name in _STAGE_WAITS:
        share = _number(row, name)
        table.add_row(label, _bar(share, "yellow"), _share(share, 1.0))
    return table


def _section(title: str, *columns: str) -> Table:
    table = Table(box=None, expand=True, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(title, header_style="cyan", no_wrap=True, ratio=1)
    for column in columns:
        table.add_column(column, header_style="dim", justify="right", no_wrap=True)
    return table


def _bar(share: float, style: str) -> ProgressBar:
    completed = min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
    return ProgressBar(1.0, completed, complete_style=style, finished_style=style)


def _number(row: Row, name: str) -> float:
    value = row.get(name, math.nan)
    return math.nan if isinstance(value, str) else float(value)


def _short(value: float) -> str:
    """Counts and rates in three to four digits: 999, 12.3 k, 4.21 M."""
    if not math.isfinite(value):
        return _MISSING
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        # From 0.9995 up, three digits would round to 1000 of the smaller unit.
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            return (
                f"{scaled:.{2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0}f} {unit}"
            )
    return f"{value:.0f}" if value == round(value) or abs(value) >= 99.95 else f"{value:.1f}"


def _plain(value: float) -> str:
    """Returns and losses with their sign, in about four digits."""
    if not math.isfinite(value):
        return _MISSING
    if value == 0 or 0.001 <= abs(value) < 1e5:
        return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}".rstrip("0").rstrip(".")
    return f"{value:.2e}"


def _some(count: float) -> str:
    """A count that is worth a place only once there is something to count."""
    return _short(count) if count > 0 else _MISSING


def _pair(row: Row, first: str, second: str) -> str:
    values = (_number(row, first), _number(row, second))
    return " / ".join(f"{value:.1f}" if math.isfinite(value) else _MISSING for value in values)


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole and math.isfinite(part) else _MISSING


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return _MISSING
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{f'{days} d ' if days else ''}{hour}:{minute:02d}:{second:02d}"
