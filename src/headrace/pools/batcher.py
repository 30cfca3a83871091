"""Rows that wait become a batch, by size or by age: a dead worker must not stall the rest."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable


class Batcher:
    """A line of waiting environments, first come first served. For one thread."""

    def __init__(
        self, *, max_envs: int, max_wait_s: float, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        """Makes an empty line.

        Args:
            max_envs: a batch of so many is due at once; none is larger.
            max_wait_s: a smaller batch is due when its oldest row has waited for so long.
            now_s: the clock.
        """
        if max_envs < 1:
            raise ValueError(f"max_envs must be at least 1, not {max_envs}")
        self._max_envs = max_envs
        self._max_wait_s = max_wait_s
        self._now_s = now_s
        self._waiting: deque[tuple[int, float]] = deque()  # environment, time since when

    def __len__(self) -> int:
        """Environments that wait."""
        return len(self._waiting)

    def add(self, env_ids: Iterable[int]) -> None:
        """Puts environments at the end of the line, from now on."""
        now_s = self._now_s()
        self._waiting.extend((env_id, now_s) for env_id in env_ids)

    def ids(self) -> list[int]:
        """Environments that wait, oldest first."""
        return [env_id for env_id, _ in self._waiting]

    def take(self) -> list[int]:
        """Returns the oldest rows if a batch is due, and forgets them; else nothing."""
        if self.due_in_s() != 0.0:
            return []
        size = min(self._max_envs, len(self._waiting))
        return [self._waiting.popleft()[0] for _ in range(size)]

    def due_in_s(self) -> float | None:
        """Seconds until a batch is due with no further row: 0.0 is now, None is never."""
        if not self._waiting:
            return None
        if len(self._waiting) >= self._max_envs:
            return 0.0
        return max(0.0, self._waiting[0][1] + self._max_wait_s - self._now_s())
