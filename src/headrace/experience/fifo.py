"""Slots between server and learner: free ones, and full ones that wait their turn, oldest first.

Only slot numbers pass through here; the rows stay where they are (`experience.unrolls`). The bound
on full slots is what bounds the policy lag: the server waits in `wait_for_space`, and its waiting
is measured.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from headrace.errors import DeadlineExceeded


class Slots(Protocol):
    """What a learner needs of the slots, whoever fills them."""

    capacity: int
    stale: int

    def __len__(self) -> int:
        """Full slots that wait."""

    def reading(
        self, count: int, *, timeout_s: float, keep: Callable[[int], bool] = ...
    ) -> AbstractContextManager[list[int]]:
        """See `SlotQueue.reading`."""

    def wait_for_space(self, timeout_s: float) -> bool:
        """See `SlotQueue.wait_for_space`."""

    def wait_for_full(self, timeout_s: float) -> bool:
        """See `SlotQueue.wait_for_full`."""


def any_slot(_: int) -> bool:
    """Keeps every slot; a queue need not ask it of each."""
    return True


class SlotQueue:
    """First in, first out; one owner per slot, always: the server, this queue, or a reader."""

    def __init__(self, num_slots: int, *, capacity: int) -> None:
        self._slots = threading.Condition()  # guards _free and _full
        self._free = deque(range(num_slots))
        self._full: deque[int] = deque()
        self.capacity = capacity
        self.stale = 0
        """Full slots that a reader did not want to keep: freed unread, and counted here."""

    def __len__(self) -> int:
        with self._slots:
            return len(self._full)

    def acquire(self, count: int) -> list[int]:
        """Takes free slots to write. Never waits: `wait_for_space` keeps some free."""
        with self._slots:
            if len(self._free) < count:
                raise RuntimeError(
                    f"{count} slots wanted, {len(self._free)} free: num_slots is too small"
                )
            return [self._free.popleft() for _ in range(count)]

    def put(self, slots: Sequence[int]) -> None:
        """Hands full slots over, in this order."""
        with self._slots:
            self._full.extend(slots)
            self._slots.notify_all()

    def wait_for_space(self, timeout_s: float) -> bool:
        """Waits until fewer than `capacity` slots are full; False after `timeout_s`."""
        with self._slots:
            return self._slots.wait_for(lambda: len(self._full) < self.capacity, timeout_s)

    def wait_for_full(self, timeout_s: float) -> bool:
        """Waits until some slot is full; False after `timeout_s`."""
        with self._slots:
            return self._slots.wait_for(lambda: bool(self._full), timeout_s)

    @contextmanager
    def reading(
        self, count: int, *, timeout_s: float, keep: Callable[[int], bool] = any_slot
    ) -> Iterator[list[int]]:
        """Lends the oldest `count` full slots, free again when the block ends; copy inside it.

        If the block raises, they go back to the front, full. Too few after `timeout_s`: none is
        taken. Full slots that `keep` refuses are freed at once.

        Raises:
            DeadlineExceeded: fewer than `count` slots were full after `timeout_s`.
        """
        with self._slots:
            if not self._slots.wait_for(lambda: self._kept(keep) >= count, timeout_s):
                raise DeadlineExceeded(
                    f"{len(self._full)} of {count} unrolls after {timeout_s:g} s"
                )
            lent = [self._full.popleft() for _ in range(count)]
        try:
            yield lent
        except BaseException:
            with self._slots:
                self._full.extendleft(reversed(lent))
            raise
        with self._slots:
            self._free.extend(lent)
            self._slots.notify_all()

    def _kept(self, keep: Callable[[int], bool]) -> int:
        """Frees the full slots that `keep` refuses; returns how many are left."""
        if keep is any_slot:
            return len(self._full)
        stale = [slot for slot in self._full if not keep(slot)]
        if stale:
            self._full = deque(slot for slot in self._full if slot not in stale)
            self._free.extend(stale)
            self.stale += len(stale)
            self._slots.notify_all()
        return len(self._full)

    def state(self) -> dict[str, list[int]]:
        """Returns which slots are free and which full, in order."""
        with self._slots:
            return {"free": list(self._free), "full": list(self._full)}

    def restore(self, state: dict[str, list[int]]) -> None:
        """Puts back what `state` gave."""
        with self._slots:
            self._free, self._full = deque(state["free"]), deque(state["full"])
            self._slots.notify_all()
