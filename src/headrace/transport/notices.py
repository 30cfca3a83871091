"""Lines for the user about who came, few however many come."""

from __future__ import annotations

from collections.abc import Callable

_BURST = 10
_INTERVAL_S = 5.0


class Notices:
    """Lets ten lines through at once and then one every five seconds; says how many it kept."""

    def __init__(self, on_message: Callable[[str], None], *, now_s: float) -> None:
        self._on_message = on_message
        self._allowed = float(_BURST)
        self._since_s = now_s
        self._kept = 0

    def say(self, line: str, *, now_s: float) -> None:
        """Passes the line on, or counts it."""
        self._allowed = min(_BURST, self._allowed + (now_s - self._since_s) / _INTERVAL_S)
        self._since_s = now_s
        if self._allowed < 1:
            self._kept += 1
            return
        self._allowed -= 1
        more, self._kept = self._kept, 0
        self._on_message(f"{line} ({more} more such lines were left out)" if more else line)
