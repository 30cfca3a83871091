"""Numbers with their units, gathered where the work is done and read by whoever reports.

Nothing here reads a clock: time is an argument.
"""

from __future__ import annotations

import math
import re
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

_EPISODES_AVERAGED = 100
_MOST_NAMES = 64  # of numbers that environments report: each is a column of every row from then on
_LONGEST_NAME = 100


class Rate:
    """Counts things and says how many came per second. One thread adds; any thread reads."""

    def __init__(self, unit: str, start_s: float | None = None) -> None:
        """Counts `unit`. Without `start_s` the first `read` starts the clock and gives 0."""
        self.unit = unit
        self.total = 0
        self._read_total = 0
        self._read_s = start_s

    def add(self, count: int) -> None:
        """Counts `count` more."""
        self.total += count

    def read(self, now_s: float) -> tuple[float, str]:
        """Returns the rate since the last read, and its unit, such as env_frames/s."""
        # The reader never resets the total, so that it cannot lose what is added meanwhile.
        total, elapsed_s = self.total, now_s - (now_s if self._read_s is None else self._read_s)
        value = (total - self._read_total) / elapsed_s if elapsed_s > 0 else 0.0
        self._read_total, self._read_s = total, now_s
        return value, f"{self.unit}/s"


class Quantiles:
    """The newest `capacity` values of something. One thread adds; any thread reads."""

    def __init__(self, capacity: int) -> None:
        self._ring = np.full(capacity, math.nan)
        self._added = 0

    def add(self, value: float) -> None:
        """Keeps a value, in place of the oldest when full."""
        self._ring[self._added % len(self._ring)] = value
        self._added += 1

    def read(self) -> tuple[float, float]:
        """Returns (p50, p99) in the unit of the values; NaN before the first."""
        kept = self._ring[: min(self._added, len(self._ring))]
        if not len(kept):
            return math.nan, math.nan
        p50, p99 = np.quantile(kept, (0.5, 0.99))
        return float(p50), float(p99)


class EpisodeStats:
    """Raw returns and lengths of finished episodes, and what environments report of them."""

    def __init__(
        self,
        episodes: int = 0,
        return_max: float = math.nan,
        *,
        on_message: Callable[[str], None] | None = None,
    ) -> None:
        """Goes on from what `read` gave before a resume.

        Args:
            episodes: How many there were.
            return_max: Of them.
            on_message: Told once, by the thread that adds, that there were too many names.
        """
        self._lock = threading.Lock()  # guards everything below
        self._episodes = episodes
        self._return_max = return_max
        self._returns: deque[float] = deque(maxlen=_EPISODES_AVERAGED)
        self._lengths: deque[float] = deque(maxlen=_EPISODES_AVERAGED)
        self._infos: deque[dict[str, float]] = deque(maxlen=_EPISODES_AVERAGED)
        self._names: set[str] = set()
        self._on_message = on_message

    def add(
        self,
        returns: Sequence[float] | NDArray[np.floating],
        lengths: Sequence[int] | NDArray[np.integer],
        infos: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """Adds episodes that just ended.

        Args:
            returns: [N] raw, undiscounted.
            lengths: [N] agent_steps.
            infos: N times the numbers of the final `info`; nothing for none. Numbers that are not
                finite are left out, as are names beyond the first 64 of the run.
        """
        newest = slice(-_EPISODES_AVERAGED, None)
        with self._lock:
            # Thousands may end at once, and these forget all but the newest.
            self._returns.extend(map(float, returns[newest]))
            self._lengths.extend(map(float, lengths[newest]))
            if infos:
                for _, _, info in zip(returns, lengths, infos, strict=True):
                    self._infos.append(self._kept(info))
            else:
                self._infos.extend([{}] * len(returns[newest]))
            if len(returns):
                # fmax: the first maximum is NaN, and any number replaces it.
                self._return_max = float(np.fmax(self._return_max, np.fmax.reduce(returns)))
            self._episodes += len(returns)

    def read(self) -> dict[str, float | int]:
        """Returns episodes and return_max of the whole run, and means of the last 100 episodes.

        Numbers that no episode has given yet are NaN. episode/NAME is the mean over those of the
        100 that reported NAME, and is missing where none did.
        """
        with self._lock:
            reported: dict[str, list[float]] = {}
            for info in self._infos:
                for name, value in info.items():
                    reported.setdefault(f"episode/{name}", []).append(value)
            return {
                "episodes": self._episodes,
                "return_mean": _mean(self._returns),
                "return_max": self._return_max,
                "length_mean": _mean(self._lengths),
                **{name: _mean(values) for name, values in sorted(reported.items())},
            }

    def _kept(self, info: Mapping[str, float]) -> dict[str, float]:
        kept: dict[str, float] = {}
        for given, value in info.items():
            name = clean_name(given)
            if not math.isfinite(value):
                continue
            if name not in self._names:
                if len(self._names) == _MOST_NAMES:
                    self._say_too_many(name)
                    continue
                self._names.add(name)
            kept[name] = float(value)
        return kept

    def _say_too_many(self, name: str) -> None:
        if self._on_message is not None:
            self._on_message(
                f"the environment reports more than {_MOST_NAMES} numbers at the ends of its "
                f"episodes: episode/{name} and every other new name is left out of the metrics"
            )
            self._on_message = None


def clean_name(name: str) -> str:
    """Returns `name` as all readers of metrics take it: ASCII letters, digits and _ - . / alone.

    Names that differ only in what is replaced become one.
    """
    return re.sub(r"[^\w./-]", "_", str(name), flags=re.ASCII).strip("/")[:_LONGEST_NAME] or "_"


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values) if values else math.nan


class Waits:
    """Seconds that each stage spent waiting, by name. Any thread adds; any thread reads."""

    def __init__(self) -> None:
        self._seconds_lock = threading.Lock()  # guards _seconds
        self._seconds: dict[str, float] = {}

    def add(self, name: str, seconds: float) -> None:
        """Adds one wait."""
        with self._seconds_lock:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def read(self) -> dict[str, float]:
        """Returns the seconds by name since the last read; every name ever added is there."""
        with self._seconds_lock:
            seconds = self._seconds
            self._seconds = dict.fromkeys(seconds, 0.0)
        return seconds
