"""What a turn of `headrace bench wire` is asked, and how it counts."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

TIMEOUT_S = 60.0
"""Longest that either end waits for the other."""
_WARM_UP_SHARE = 0.2  # of the time that is measured
_WARM_UP_MESSAGES = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """The same bytes for everyone."""

    implementation: str
    envs: int
    """Environments whose frames travel in one message."""
    frame_shape: tuple[int, ...]
    """Of one uint8 frame."""
    in_flight: int
    """Messages under way at a time."""
    seconds: float
    """Seconds that are measured, after a fifth to warm up."""

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """Of the frames of a message."""
        return (self.envs, *self.frame_shape)

    def frames(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Returns what a message shows; the same each time that it is called."""
        return np.random.default_rng(0).integers(0, 256, self.observation_shape, np.uint8)

    def actions(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Returns what the server answers."""
        return np.arange(self.envs, dtype=np.int64) % 4


class Tally:
    """Counts frames that have come to the server, and how long after its answer they did.

    For one thread, but `over` and `finished`.
    """

    def __init__(self, seconds: float, *, host_cpu_s: Callable[[], float | None]) -> None:
        """Starts counting when things are warm.

        Args:
            seconds: That are measured.
            host_cpu_s: Gives the processor time of the host so far; None if that is not known.
        """
        self.finished = threading.Event()
        self._host_cpu_s = host_cpu_s
        self._seconds = seconds
        self._began_s = time.perf_counter()
        self._since_s: float | None = None
        self._cpu_s: tuple[float, float | None] = (0.0, None)
        self._answered_s: dict[int, float] = {}
        self._latency_s: list[float] = []
        self._result: dict[str, Any] = {}
        self._warm = 0

    @property
    def over(self) -> bool:
        """Whether enough was measured."""
        return self.finished.is_set()

    def arrived(self, key: int) -> None:
        """Frames are here. `key` says to which of the messages in flight they belong."""
        now_s = time.perf_counter()
        before_s = self._answered_s.get(key)
        if self._since_s is None:
            self._warm += 1
            warm_s = _WARM_UP_SHARE * self._seconds
            if self._warm >= _WARM_UP_MESSAGES and now_s - self._began_s >= warm_s:
                self._since_s, self._cpu_s = now_s, self._both_cpu_s()
            return
        if before_s is not None:
            self._latency_s.append(now_s - before_s)
        elapsed_s = now_s - self._since_s
        if elapsed_s >= self._seconds and not self._result:
            server_s, host_s = self._both_cpu_s()
            before_host_s = self._cpu_s[1]
            self._result = {
                "messages": len(self._latency_s),
                "elapsed_s": elapsed_s,
                "server_cpu_s": server_s - self._cpu_s[0],
                "host_cpu_s": (
                    None if host_s is None or before_host_s is None else host_s - before_host_s
                ),
                "latency_s": self._latency_s,
            }
            self.finished.set()

    def answered(self, key: int) -> None:
        """Actions are about to be sent for the frames that came."""
        if self._warm == 1:  # starting up is no part of warming up
            self._began_s = time.perf_counter()
        self._answered_s[key] = time.perf_counter()

    def result(self) -> dict[str, Any]:
        """Returns what was counted, once it has finished."""
        return self._result

    def _both_cpu_s(self) -> tuple[float, float | None]:
        return time.process_time(), self._host_cpu_s()


def cpu_s_of(pid: int) -> float | None:
    """Returns the processor time that a process has taken; None if it is gone, or not on Linux."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
