"""Numbers with their units, gathered where the work is done and read by whoever reports.

Nothing here reads a clock: time is an argument.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_EPISODES_AVERAGED = 100


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
    """Raw returns and lengths of finished episodes."""

    def __init__(self, episodes: int = 0, return_max: float = math.nan) -> None:
        """Goes on from what `read` gave before a resume."""
        self._lock = threading.Lock()  # guards everything below
        self._episodes = episodes
        self._return_max = return_max
        self._returns: deque[float] = deque(maxlen=_EPISODES_AVERAGED)
        self._lengths: deque[float] = deque(maxlen=_EPISODES_AVERAGED)

    def add(
        self,
        returns: Sequence[float] | NDArray[np.floating],
        lengths: Sequence[int] | NDArray[np.integer],
    ) -> None:
        """Adds episodes that just ended: raw returns [N], undiscounted, and agent_steps [N]."""
        with self._lock:
            for value, length in zip(returns, lengths, strict=True):
                self._returns.append(float(value))
                self._lengths.append(float(length))
                # fmax: the first maximum is NaN, and any number replaces it.
                self._return_max = float(np.fmax(self._return_max, value))
            self._episodes += len(returns)

    def read(self) -> dict[str, float | int]:
        """Returns episodes and return_max of the whole run, and means of the last 100 episodes.

        Numbers that no episode has given yet are NaN.
        """
        with self._lock:
            return {
                "episodes": self._episodes,
                "return_mean": _mean(self._returns),
                "return_max": self._return_max,
                "length_mean": _mean(self._lengths),
            }


def _mean(values: deque[float]) -> float:
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
