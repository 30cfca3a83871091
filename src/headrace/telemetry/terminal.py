"""What a user sees while a run trains: a live table in a terminal, short lines anywhere else.

Everything is drawn by the caller's thread inside `update`, at most once per interval: a drawing
thread would hold the interpreter's lock against the threads that train.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Protocol, TextIO

from rich.console import Console
from rich.live import Live

from headrace.algorithms.base import Shown, ShownMetrics
from headrace.length import Length
from headrace.run_files import escaped, escaped_lines
from headrace.telemetry.panel import done, far, render
from headrace.telemetry.wording import MISSING, Row, clock, fixed, number, plain, share, short, some

_LIVE_INTERVAL_S = 1.0


class Display(Protocol):
    """Where progress is shown."""

    def update(self, row: Row) -> None:
        """Shows a row, unless one was shown a moment ago."""

    def message(self, text: str) -> None:
        """Shows a line that stays."""


@contextmanager
def open_display(
    length: Length,
    title: str,
    metrics: ShownMetrics,
    *,
    stream: TextIO | None = None,
    live: bool | None = None,
    plain_interval_s: float = 5.0,
    now_s: Callable[[], float] = monotonic,
) -> Iterator[Display]:
    """Shows the progress of a run for as long as the block runs; the last row is always shown.

    Args:
        length: where the run ends.
        title: what is trained, in a few words.
        metrics: those of what learns that are shown.
        stream: where to write; standard output by default.
        live: a table that redraws itself (True) or plain lines (False); by default a table where
            `stream` is a terminal that can redraw and show it.
        plain_interval_s: shortest time between two plain lines.
        now_s: monotonic clock in seconds.
    """
    stream, title = stream or sys.stdout, escaped(title)
    console = Console(file=stream, highlight=False, force_terminal=live)
    if live is None:
        live = console.is_terminal and not console.is_dumb_terminal and not _is_ascii(console)
    progress = _Progress(length, now_s)
    display: _LiveDisplay | _PlainDisplay
    if not live:
        display = _PlainDisplay(stream, title, metrics, progress, plain_interval_s)
        try:
            yield display
        finally:
            display.draw()
        return
    with Live(console=console, auto_refresh=False) as region:
        display = _LiveDisplay(region, title, metrics, progress)
        try:
            yield display
        finally:
            display.draw()


def _is_ascii(console: Console) -> bool:
    return not console.encoding.lower().startswith("utf")


class _Progress:
    """Time: when something was shown last, and how long the rest will take."""

    def __init__(self, length: Length, now_s: Callable[[], float]) -> None:
        self.length = length
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
        env_frames, now_s = number(row, "env_frames"), self._now_s()
        if self._first is None:
            self._first = (now_s, env_frames)
        first_s, first_frames = self._first
        pace = number(row, "env_frames_per_s")
        if now_s > first_s and env_frames > first_frames:
            pace = (env_frames - first_frames) / (now_s - first_s)
        left = max(0.0, self.length.total_frames - env_frames)
        left_s = left / pace if pace > 0 else math.nan
        if self.length.total_minutes is None:
            return left_s
        clock_s = max(0.0, 60 * self.length.total_minutes - number(row, "elapsed_s"))
        return min(clock_s, left_s)  # the clock where there is no pace yet


class _PlainDisplay:
    """One short ASCII line per update, for files, pipes and CI."""

    def __init__(
        self,
        stream: TextIO,
        title: str,
        metrics: ShownMetrics,
        progress: _Progress,
        interval_s: float,
    ) -> None:
        self._stream = stream
        self._metric = metrics.line
        self._progress = progress
        self._interval_s = interval_s
        self._line = ""
        self.message(title)

    def update(self, row: Row) -> None:
        self._line = plain_line(row, self._progress.length, self._progress.eta_s(row), self._metric)
        if self._progress.is_due(self._interval_s):
            self.draw()

    def draw(self) -> None:
        """Writes the newest line if it was not written yet."""
        if self._line:
            self.message(self._line)
        self._line = ""

    def message(self, text: str) -> None:
        text = escaped_lines(text)
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        self._stream.flush()


class _LiveDisplay:
    """A table that redraws itself in place."""

    def __init__(
        self, region: Live, title: str, metrics: ShownMetrics, progress: _Progress
    ) -> None:
        self._region = region
        self._title = title
        self._shown = metrics.panel
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
        length = self._progress.length
        table = render(self._title, self._row, length, self._eta_s, self._shown)
        self._region.update(table, refresh=True)

    def message(self, text: str) -> None:
        self._region.console.print(escaped_lines(text), markup=False)


def plain_line(row: Row, length: Length, eta_s: float, metric: Shown) -> str:
    """Says in one line how far the run is and how well it does; leaves out what is not known.

    `metric` is the one of what learns.
    """
    label, name = metric
    parts = [f"{far(row, length, '/')} ({share(done(row, length))})"]
    for pattern, value in (
        ("{} frames/s", short(number(row, "env_frames_per_s"))),
        ("{} samples/s learned", short(number(row, "update_frame_rate_hz"))),
        ("eta {}", clock(eta_s)),
        ("return {}", plain(number(row, "return_mean"))),
        ("best {}", plain(number(row, "return_max"))),
        ("evaluation {}", plain(number(row, "eval_return_mean"))),
        ("episodes {}", short(number(row, "episodes"))),
        (f"{label} {{}}", plain(number(row, name))),
        ("lag {}", plain(number(row, "policy_lag_mean"))),
        ("replay {}", short(number(row, "replay_sequences"))),
        ("cores {}", fixed(number(row, "cpu_load"))),
        ("gpu {}", share(number(row, "gpu_load"))),
        ("worker deaths {}", some(number(row, "worker_deaths"))),
        ("evaluator deaths {}", some(number(row, "evaluator_deaths"))),
        ("viewer deaths {}", some(number(row, "viewer_deaths"))),
        ("bottleneck {}", str(row.get("bottleneck", MISSING))),
    ):
        if value != MISSING:
            parts.append(pattern.replace("{}", value))
    return "  ".join(parts).replace(MISSING, "-")
