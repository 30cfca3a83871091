"""Rows that wait become a batch, by size or by age: a dead worker must not stall the rest."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence


class Batcher:
    """A line of waiting blocks of environments, first come first served. For one thread.

    A block is a group of environments that step together, known by its number. It is never cut.
    """

    def __init__(
        self,
        block_sizes: Sequence[int],
        *,
        max_envs: int,
        max_wait_s: float,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Makes an empty line.

        Args:
            block_sizes: environments of block 0, 1, ...
            max_envs: a batch is due at once when no further block would fit into so many
                environments; none is larger.
            max_wait_s: a smaller batch is due when its oldest block has waited for so long.
            now_s: the clock.
        """
        if not max(block_sizes) <= max_envs:
            raise ValueError(
                f"max_envs must be at least the largest block, {max(block_sizes)}, not {max_envs}"
            )
        self._sizes = tuple(block_sizes)
        self._full = max_envs - min(block_sizes)  # environments above which nothing fits
        self._max_envs = max_envs
        self._max_wait_s = max_wait_s
        self._now_s = now_s
        self._waiting: deque[tuple[int, float]] = deque()  # block, time since when
        self._envs = 0

    def __len__(self) -> int:
        """Environments that wait."""
        return self._envs

    def add(self, blocks: Iterable[int]) -> None:
        """Puts blocks at the end of the line, from now on."""
        now_s = self._now_s()
        for block in blocks:
            self._waiting.append((block, now_s))
            self._envs += self._sizes[block]

    def drop(self, blocks: Collection[int]) -> None:
        """Takes blocks out of the line, if they are in it: their worker is dead."""
        self._waiting = deque(entry for entry in self._waiting if entry[0] not in blocks)
        self._envs = sum(self._sizes[block] for block, _ in self._waiting)

    def blocks(self) -> list[int]:
        """Blocks that wait, oldest first."""
        return [block for block, _ in self._waiting]

    def take(self) -> list[int]:
        """Returns the oldest blocks if a batch is due, and forgets them; else nothing."""
        if self.due_in_s() != 0.0:
            return []
        taken: list[int] = []
        left = self._max_envs
        while self._waiting and self._sizes[self._waiting[0][0]] <= left:
            block, _ = self._waiting.popleft()
            taken.append(block)
            left -= self._sizes[block]
        self._envs -= self._max_envs - left
        return taken

    def due_in_s(self) -> float | None:
        """Seconds until a batch is due with no further block: 0.0 is now, None is never."""
        if not self._waiting:
            return None
        if self._envs > self._full:
            return 0.0
        return max(0.0, self._waiting[0][1] + self._max_wait_s - self._now_s())
