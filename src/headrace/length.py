"""How long a run is: in frames, and by the clock where it has one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple


class Length(NamedTuple):
    """Where a run ends: at its frames or its minutes, whichever comes first."""

    total_frames: int  # env_frames
    total_minutes: float | None = None  # None: no clock

    def share_of_minutes(self, elapsed_s: float) -> float:
        """Returns how much of the minutes has passed; 0 without a clock."""
        return 0.0 if self.total_minutes is None else elapsed_s / (60.0 * self.total_minutes)

    def progress(self, env_frames: float, elapsed_s: float) -> float:
        """Returns the share of the run that is done, in [0, 1]: of frames or time, the larger."""
        done = max(env_frames / self.total_frames, self.share_of_minutes(elapsed_s))
        return min(done, 1.0)  # in this order NaN stays NaN


def clock_from(started_s: float) -> Callable[[], float]:
    """Returns what says how many seconds have passed since `started_s` of `time.monotonic`."""
    return lambda: time.monotonic() - started_s
