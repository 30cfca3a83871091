"""The one stopwatch of all peer runners, so that warm-up and window mean the same for each."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable


def parse_times(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Adds the two durations that every runner takes, and parses the command line."""
    parser.add_argument("--warmup-s", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    return parser.parse_args()


class Window:
    """Measures the steps a learner consumed between two of its updates, after a warm-up.

    Both ends of the window are ends of updates: whole cycles of acting and learning are counted.
    """

    def __init__(
        self, *, warmup_s: float, seconds: float, now_s: Callable[[], float] = time.perf_counter
    ) -> None:
        self._warmup_s = warmup_s
        self._seconds = seconds
        self._now_s = now_s
        self._first_update_s: float | None = None
        self._start: tuple[float, int, int | None] | None = None
        self.result: dict[str, float] | None = None

    def update_ended(self, agent_steps: int, updates: int | None = None) -> bool:
        """Notes the end of an update; True when measured.

        Args:
            agent_steps: The learner's total.
            updates: Total of updates, where there should be one per agent step: then a step counts
                when both were done, so that nobody gains by acting ahead of learning.
        """
        now_s = self._now_s()
        if self._first_update_s is None:
            self._first_update_s = now_s
        if self._start is None:
            if now_s - self._first_update_s >= self._warmup_s:
                self._start = (now_s, agent_steps, updates)
            return False
        start_s, start_steps, start_updates = self._start
        elapsed_s = now_s - start_s
        if self.result is None and elapsed_s >= self._seconds:
            consumed, ratio = agent_steps - start_steps, {}
            if updates is not None and start_updates is not None:
                learned = updates - start_updates
                ratio = {"updates_per_agent_step": learned / max(consumed, 1)}
                consumed = min(consumed, learned)
            self.result = {
                "agent_steps_per_s": consumed / elapsed_s,
                "agent_steps": consumed,
                "window_s": elapsed_s,
                "warmup_s": self._warmup_s,
                **ratio,
            }
            print(json.dumps(self.result), flush=True)
        return self.result is not None
