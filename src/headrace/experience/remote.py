"""Slots where unrolls come from other machines: a host sends one only on a credit for it.

    host                                   learner
    rows ─▶ slots of its own ── unroll ──▶ arrive ─▶ slot ─▶ put ─▶ reading: oldest first
    acts while it has credits ◀── credits ──────── free again ◀───┘

A credit stands for a slot of the learner's that is free, so what comes always has a place, and the
bound on slots is what bounds the policy lag. With `capacity` unrolls that may wait, and n of the C
environments that are connected, answered m at a time, a host has

    capacity * n / C   unrolls, rounded down, and
    m                  that one batch of steps may fill at once

which are on their way, full, or being read. It waits while it has fewer than m credits. So if all
hosts wait, at least `capacity` unrolls are full, which is a batch of the learner's: it goes on. No
more than `capacity` + N are ever full, with N environments in all. Hosts come and go: what is left
of one that is gone counts until it is read, and then the others have its part.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.errors import DeadlineExceeded


def free_stretch(is_free: NDArray[np.bool_], most: int) -> tuple[int, int]:
    """Returns first and count of the environments that suit a host; a count of 0 if none is free.

    Environments of a host follow each other. It gets the smallest gap that holds as many as it
    takes, or else the largest one.

    Args:
        is_free: [N] which environments nobody has.
        most: That it takes.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_free, [False]])))
    gaps = [(int(first), int(end - first)) for first, end in edges.reshape(-1, 2)]
    holding = [gap for gap in gaps if gap[1] >= most]
    if holding:
        return min(holding, key=lambda gap: gap[1])[0], most
    return max(gaps, key=lambda gap: gap[1], default=(0, 0))


@dataclass(slots=True)
class _Account:
    """What one host may have."""

    num_envs: int
    max_batch: int
    credits: int = 0  # unrolls that it may send
    taken: int = 0  # slots that hold unrolls of it


class CreditSlots:
    """The learner's end. Any thread lets unrolls in; one thread reads."""

    def __init__(
        self,
        num_envs: int,
        *,
        capacity: int,
        grant: Callable[[int, int], None],
        at_rest: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts without hosts.

        Args:
            num_envs: Of all hosts.
            capacity: Full unrolls that may wait before hosts do, all together.
            grant: Tells a host of so many more credits; in any thread, without waiting.
            at_rest: Called by the thread that reads, before it waits and when it is woken.
        """
        self.num_slots = num_envs + capacity
        self.capacity = capacity
        self.stale = 0
        """Full slots that a reader did not want to keep: freed unread, and counted here."""
        self._slots = threading.Condition()  # guards all that follows
        self._free = deque(range(self.num_slots))
        self._full: deque[int] = deque()
        self._owner = [-1] * self.num_slots  # host whose unroll a slot holds
        self._hosts: dict[int, _Account] = {}
        self._woken = False
        self._refused = False  # slots are free that were not divided yet
        self._grant, self._at_rest = grant, at_rest

    def __len__(self) -> int:
        with self._slots:
            return len(self._full)

    def join(self, host: int, *, num_envs: int, max_batch: int) -> None:
        """Opens an account for a host, by a number that no other had; grants its first credits."""
        with self._slots:
            self._hosts[host] = _Account(num_envs, max_batch)
            grants = self._settle()
        self._tell(grants)

    def leave(self, host: int) -> None:
        """Closes a host's account; what it has sent stays, the rest is for the others."""
        with self._slots:
            del self._hosts[host]
            grants = self._settle()
        self._tell(grants)

    def arrive(self, host: int) -> int | None:
        """Takes a slot to write an unroll of a host into; None if it had no credit for one."""
        with self._slots:
            account = self._hosts[host]
            if not account.credits:
                return None
            account.credits -= 1
            account.taken += 1
            slot = self._free.popleft()
            self._owner[slot] = host
            return slot

    def put(self, slots: Sequence[int]) -> None:
        """Hands full slots over, in this order."""
        with self._slots:
            self._full.extend(slots)
            self._slots.notify_all()

    def wake(self) -> None:
        """Lets the reading thread, if it waits, do what there is to do at rest."""
        with self._slots:
            self._woken = True
            self._slots.notify_all()

    def acquire(self, count: int) -> list[int]:
        """Nothing is built on this side.

        Raises:
            RuntimeError: more than nothing was wanted.
        """
        if count:
            raise RuntimeError(f"{count} slots wanted where only hosts write")
        return []

    def wait_for_space(self, timeout_s: float) -> bool:
        """Never waits: hosts do, each for its own credits; an evaluation writes nothing."""
        return True

    def wait_for_full(self, timeout_s: float) -> bool:
        """Waits until some slot is full; False after `timeout_s`."""
        return self._wait_for(lambda: bool(self._full), timeout_s)

    @contextmanager
    def reading(
        self, count: int, *, timeout_s: float, keep: Callable[[int], bool] = lambda _: True
    ) -> Iterator[list[int]]:
        """Lends the oldest `count` full slots; see `SlotQueue.reading`.

        Raises:
            DeadlineExceeded: fewer than `count` slots were full after `timeout_s`.
        """
        if not self._wait_for(lambda: self._kept(keep) >= count, timeout_s):
            raise DeadlineExceeded(f"{len(self)} of {count} unrolls after {timeout_s:g} s")
        with self._slots:  # nobody else takes any
            lent = [self._full.popleft() for _ in range(count)]
        try:
            yield lent
        except BaseException:
            with self._slots:
                self._full.extendleft(reversed(lent))
            raise
        with self._slots:
            self._give_back(lent)
            grants = self._settle()
        self._tell(grants)

    def _wait_for(self, ready: Callable[[], bool], timeout_s: float) -> bool:
        """Waits until `ready()`, asked under the lock; False after `timeout_s`."""
        until_s = time.monotonic() + timeout_s
        while True:
            with self._slots:
                is_ready = ready()
                self._woken = False  # before `_at_rest`, which sees what was wanted until here
                grants = self._settle() if self._refused else []
                self._refused = False
            self._tell(grants)
            left_s = until_s - time.monotonic()
            if is_ready or left_s <= 0.0:
                return is_ready
            self._at_rest()
            with self._slots:
                # What was refused meanwhile is free: its hosts may be out of credits.
                self._slots.wait_for(lambda: ready() or self._refused or self._woken, left_s)

    def _kept(self, keep: Callable[[int], bool]) -> int:
        """Frees the full slots that `keep` refuses; returns how many are left."""
        stale = {slot for slot in self._full if not keep(slot)}
        if stale:
            self._full = deque(slot for slot in self._full if slot not in stale)
            self.stale += len(stale)
            self._refused = True
            self._give_back(sorted(stale))
        return len(self._full)

    def _give_back(self, slots: Sequence[int]) -> None:
        for slot in slots:
            account = self._hosts.get(self._owner[slot])
            if account is not None:
                account.taken -= 1
        self._free.extend(slots)

    def _settle(self) -> list[tuple[int, int]]:
        """Divides what is spare; returns hosts with the credits that each has gained."""
        connected = sum(account.num_envs for account in self._hosts.values())
        spare = len(self._free) - sum(account.credits for account in self._hosts.values())
        grants = []
        for host, account in self._hosts.items():
            part = self.capacity * account.num_envs // connected + account.max_batch
            gained = min(part - account.credits - account.taken, spare)
            if gained > 0:
                account.credits += gained
                spare -= gained
                grants.append((host, gained))
        return grants

    def _tell(self, grants: Sequence[tuple[int, int]]) -> None:
        """Without the lock: a host that is told may turn out to be gone."""
        for host, credits_gained in grants:
            self._grant(host, credits_gained)


class HostSlots:
    """A host's end: slots of its own, which are free again as soon as their unroll is sent."""

    def __init__(
        self,
        num_envs: int,
        *,
        max_batch: int,
        send: Callable[[int], None],
        listen: Callable[[float], None],
    ) -> None:
        """Starts without credits.

        Args:
            num_envs: Environments that write here.
            max_batch: Most of them that are answered at a time.
            send: Copies the unroll in a slot and sends it.
            listen: Takes what has come from the learner; waits so many seconds for something.
        """
        self.num_slots = num_envs + max_batch
        self.credits = 0
        self._free = deque(range(self.num_slots))
        self._max_batch = max_batch
        self._send, self._listen = send, listen

    def gain(self, count: int) -> None:
        """Takes credits that the learner has granted."""
        self.credits += count

    def acquire(self, count: int) -> list[int]:
        """Takes free slots to write. Never waits: `put` frees as many as it is given."""
        return [self._free.popleft() for _ in range(count)]

    def put(self, slots: Sequence[int]) -> None:
        """Sends full slots, in this order."""
        for slot in slots:
            self.credits -= 1
            self._send(slot)
            self._free.append(slot)

    def wait_for_space(self, timeout_s: float) -> bool:
        """Waits until what one more batch of steps fills may be sent; False after `timeout_s`."""
        until_s = time.monotonic() + timeout_s
        self._listen(0.0)
        while self.credits < self._max_batch:
            left_s = until_s - time.monotonic()
            if left_s <= 0.0:
                return False
            self._listen(left_s)
        return True
