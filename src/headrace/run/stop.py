"""How a run is asked to end: Ctrl-C and SIGTERM."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SAME_SIGNAL_S = 0.5


class Stop:
    """Whether the run was asked to end. The first signal saves and ends; a second ends at once."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self.requested = False
        self._now_s, self._since_s = now_s, 0.0

    def __call__(self, signum: int, _frame: object) -> None:
        """Handles a signal; one that comes at once again is the same: timeout(1) sends it twice."""
        if not self.requested:
            self.requested, self._since_s = True, self._now_s()
        elif self._now_s() - self._since_s >= _SAME_SIGNAL_S:
            os._exit(128 + signum)


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turns Ctrl-C and SIGTERM into `Stop.requested` for the block, if in the main thread."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
