"""Numbers that change while a run goes on, as functions of its progress.

Progress is the share of the run that is done, in [0, 1]: of its frames or of its minutes, whichever
is further.
"""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]
"""constant: as at the start. linear: in a straight line to the end. cosine: half a wave, slow at
both ends."""


def remaining(schedule: Schedule, progress: float, *, decay: float = 1.0) -> float:
    """Returns what is left of a number that falls from 1 to 0 in the last share `decay` of a run.

    Args:
        schedule: How it falls.
        progress: Of the run.
        decay: Share of the run in which it falls, above 0; before, it is 1.
    """
    if schedule == "constant":
        return 1.0
    left = min(1.0, max(0.0, 1.0 - progress) / decay)
    return left if schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


def between(start: float, end: float, schedule: Schedule, progress: float) -> float:
    """Returns a number that goes from `start` to `end` over the whole run."""
    left = remaining(schedule, progress)
    return start if left == 1.0 else end + (start - end) * left
