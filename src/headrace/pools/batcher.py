"""Rows that wait become a batch, by size or by age: a dead worker must not stall the rest."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple


class Party(NamedTuple):
    """Blocks of one team that stand together."""

    team: int
    since_s: float  # when the first of them came
    blocks: deque[int]


class Batcher:
    """A line of waiting blocks of environments, first come first served. For one thread.

    A block is a group of environments that step together, known by its number. It is never cut.
    Blocks of a team go together where they can: who comes while others of its team wait stands
    with them, unless the first of these has been taken, so that no team can keep the rest waiting.
    """

    def __init__(
        self,
        block_sizes: Sequence[int],
        *,
        max_envs: int,
        max_wait_s: float,
        teams: Sequence[int] | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Makes an empty line.

        Args:
            block_sizes: environments of block 0, 1, ...
            max_envs: a batch is due at once when no further block would fit into so many
                environments; none is larger.
            max_wait_s: a smaller batch is due when its oldest block has waited for so long.
            teams: of block 0, 1, ...; left out, each is its own.
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
        self._teams = tuple(range(len(block_sizes)) if teams is None else teams)
        self._line: deque[Party] = deque()
        self._open: dict[int, Party] = {}  # by team: who can be joined
        self._envs = 0

    def __len__(self) -> int:
        """Environments that wait."""
        return self._envs

    def add(self, blocks: Iterable[int]) -> None:
        """Puts blocks at the end of the line, or with their team, from now on."""
        now_s = self._now_s()
        for block in blocks:
            team = self._teams[block]
            party = self._open.get(team)
            if party is None:
                self._open[team] = party = Party(team, now_s, deque())
                self._line.append(party)
            party.blocks.append(block)
            self._envs += self._sizes[block]

    def drop(self, blocks: Collection[int]) -> None:
        """Takes blocks out of the line, if they are in it: their worker is dead."""
        for party in list(self._line):
            for block in [block for block in party.blocks if block in blocks]:
                party.blocks.remove(block)
                self._envs -= self._sizes[block]
            if not party.blocks:
                self._line.remove(party)
                self._close(party)

    def blocks(self) -> list[int]:
        """Blocks that wait, first to be taken first."""
        return [block for party in self._line for block in party.blocks]

    def take(self) -> list[int]:
        """Returns the first blocks if a batch is due, and forgets them; else nothing."""
        if self.due_in_s() != 0.0:
            return []
        taken: list[int] = []
        left = self._max_envs
        while self._line and self._sizes[self._line[0].blocks[0]] <= left:
            party = self._line[0]
            block = party.blocks.popleft()
            taken.append(block)
            left -= self._sizes[block]
            self._close(party)
            if not party.blocks:
                self._line.popleft()
        self._envs -= self._max_envs - left
        return taken

    def _close(self, party: Party) -> None:
        if self._open.get(party.team) is party:
            del self._open[party.team]

    def due_in_s(self) -> float | None:
        """Seconds until a batch is due with no further block: 0.0 is now, None is never."""
        if not self._line:
            return None
        if self._envs > self._full:
            return 0.0
        return max(0.0, self._line[0].since_s + self._max_wait_s - self._now_s())
