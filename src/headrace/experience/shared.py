"""Unrolls across processes: each worker fills slots of its own, the learner reads them all.

    worker w                      one table in shared memory        learner
    writes rows as they come      [ slots of 0 | slots of 1 | … ]   copies the slots that are lent
    put       --- record (slot, generation), one pipe for all --->  reading: oldest first
    acquire   <-- slot numbers, a pipe per worker ----------------  free again, or too old

A slot belongs to one worker for the whole run; who may touch it now is what the pipes decide, and
they also order the memory of the two. The learner alone keeps books: a slot is full, lent, or with
its worker. So when a worker dies, all that is not full or lent goes to the next one, and the
unrolls that it was building are gone with it.

A worker with n of the N environments, answered m at a time, has

    n                  slots under construction,
    capacity * n / N   that may be full and wait for the learner, rounded down, and
    m                  that one batch of steps may fill at once.

It waits while fewer than m are free, which is when more than its part of the capacity is full. So
if all workers wait, more than `capacity` are full, which is at least a batch of the learner's: it
goes on. And no more than capacity + N are ever full, which bounds the policy lag.
"""

from __future__ import annotations

import math
import os
import select
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.errors import DeadlineExceeded, PeerLost
from headrace.experience.unrolls import Allocate

RECORD = struct.Struct("<II")
"""slot, generation: what a worker writes when a slot is full."""

_ALIGNMENT = 64  # bytes: a cache line, so that no two columns share one
_PIPE_NBYTES = 1 << 16
_ATOMIC_NBYTES = 512  # POSIX: writes of so much to a pipe are never torn or mixed
_SLOT = np.dtype("<u4")


class Share(NamedTuple):
    """What one worker has of the environments and of the slots."""

    first_env: int
    num_envs: int
    max_batch: int
    first_slot: int
    num_slots: int


def shares(
    num_envs: int, *, workers: int, capacity: int, groups: int, unit: int = 1
) -> list[Share]:
    """Divides environments and slots among workers, as evenly as they go.

    Args:
        num_envs: Of all workers; at least as many as workers.
        workers: How many.
        capacity: Full slots that may wait, at least a batch of the learner's.
        groups: Batches in which a worker's environments are answered: 1 where the worker steps them
            itself, 2 where threads step some while it answers others.
        unit: Environments that stay with one worker.
    """
    result: list[Share] = []
    env = slot = 0
    for worker in range(workers):
        count = unit * (num_envs // unit * (worker + 1) // workers) - env
        batch = -(-count // groups)
        num_slots = count + capacity * count // num_envs + batch
        result.append(Share(env, count, batch, slot, num_slots))
        env, slot = env + count, slot + num_slots
    return result


class Columns:
    """The columns of a table, one behind the other in one block: an `Allocate`.

    Processes that ask for the same columns in the same order get the same memory.
    """

    def __init__(self, block: Any) -> None:
        """Cuts from `block`, a writable buffer of zeros."""
        self._block = block
        self._nbytes = 0

    def __call__(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Returns the next column."""
        column: NDArray[Any] = np.ndarray(shape, dtype, self._block, self._nbytes)
        self._nbytes += _padded_nbytes(shape, dtype)
        return column


def table_nbytes(make_table: Callable[[Allocate], object]) -> int:
    """Returns the bytes of all columns that `make_table` asks for."""
    nbytes = 0

    def measure(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        nonlocal nbytes
        nbytes += _padded_nbytes(shape, dtype)
        # One number that stands for all of them: nothing is allocated.
        return np.lib.stride_tricks.as_strided(np.zeros(1, dtype), shape, (0,) * len(shape))

    make_table(measure)
    return nbytes


def _padded_nbytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


class SharedSlots:
    """The learner's end: full slots of all workers, oldest first. For one thread."""

    def __init__(
        self,
        shares: Sequence[Share],
        *,
        capacity: int,
        full_fd: int,
        send: Callable[[int, bytes], None],
    ) -> None:
        """Starts with all slots at their workers.

        Args:
            shares: Of the workers.
            capacity: Full slots that may wait before the workers do, all together.
            full_fd: Where workers write records; made non-blocking.
            send: Hands bytes to a worker, without waiting.
        """
        os.set_blocking(full_fd, False)
        self._full_fd = full_fd
        self._poller = select.poll()
        self._poller.register(full_fd, select.POLLIN)
        self._shares = shares
        self._send = send
        self._worker = np.repeat(np.arange(len(shares)), [share.num_slots for share in shares])
        self._taken = np.zeros(len(self._worker), np.bool_)  # full or lent, not the worker's
        self._generation = [-1] * len(shares)  # whose records count; -1 for nobody's
        self._full: deque[int] = deque()
        self.capacity = capacity
        self.stale = 0
        """Full slots that a reader did not want to keep: freed unread, and counted here."""

    def __len__(self) -> int:
        self._collect()
        return len(self._full)

    def begin(self, worker: int, generation: int) -> list[int]:
        """Lets a worker that is about to start own what is free; returns these slots."""
        self._generation[worker] = generation
        share = self._shares[worker]
        own = np.arange(share.first_slot, share.first_slot + share.num_slots)
        return [int(slot) for slot in own[~self._taken[own]]]

    def end(self, worker: int) -> None:
        """Takes what a worker that is dead had handed over; its other slots are nobody's."""
        self._collect()
        self._generation[worker] = -1

    def acquire(self, count: int) -> list[int]:
        """Nothing is built on this side.

        Raises:
            RuntimeError: more than nothing was wanted.
        """
        if count:
            raise RuntimeError(f"{count} slots wanted where only workers write")
        return []

    def wait_for_space(self, timeout_s: float) -> bool:
        """Never waits: workers do, each for its own slots; an evaluation writes none."""
        return True

    def wait_for_full(self, timeout_s: float) -> bool:
        """Waits until some slot is full; False after `timeout_s`."""
        self._collect()
        if not self._full:
            self._poller.poll(timeout_s * 1000.0)
            self._collect()
        return bool(self._full)

    @contextmanager
    def reading(
        self, count: int, *, timeout_s: float, keep: Callable[[int], bool] = lambda _: True
    ) -> Iterator[list[int]]:
        """Lends the oldest `count` full slots; see `SlotQueue.reading`.

        Raises:
            DeadlineExceeded: fewer than `count` slots were full after `timeout_s`.
        """
        until_s = time.monotonic() + timeout_s
        self._collect()
        while self._kept(keep) < count:
            left_s = until_s - time.monotonic()
            if left_s <= 0.0:
                raise DeadlineExceeded(
                    f"{len(self._full)} of {count} unrolls after {timeout_s:g} s"
                )
            self._poller.poll(left_s * 1000.0)
            self._collect()
        lent = [self._full.popleft() for _ in range(count)]
        try:
            yield lent
        except BaseException:
            self._full.extendleft(reversed(lent))
            raise
        self._free(lent)

    def _kept(self, keep: Callable[[int], bool]) -> int:
        """Frees the full slots that `keep` refuses; returns how many are left."""
        stale = {slot for slot in self._full if not keep(slot)}
        if stale:
            self._full = deque(slot for slot in self._full if slot not in stale)
            self.stale += len(stale)
            self._free(sorted(stale))
        return len(self._full)

    def _free(self, slots: list[int]) -> None:
        """Gives slots back to their workers."""
        self._taken[slots] = False
        free = np.asarray(slots)
        for worker in np.unique(self._worker[free]):
            self._send(int(worker), free[self._worker[free] == worker].astype(_SLOT).tobytes())

    def _collect(self) -> None:
        """Takes the records that have come; those of a worker that is no more are ignored."""
        while True:
            try:
                data = os.read(self._full_fd, _PIPE_NBYTES)
            except BlockingIOError:
                return
            for slot, generation in RECORD.iter_unpack(data):
                if generation == self._generation[self._worker[slot]]:
                    if self._taken[slot]:
                        raise RuntimeError(f"slot {slot} came twice from its worker")
                    self._taken[slot] = True
                    self._full.append(slot)
            if len(data) < _PIPE_NBYTES:
                return


class WorkerSlots:
    """A worker's end: its free slots. For one thread."""

    def __init__(
        self,
        free: Sequence[int],
        *,
        reserve: int,
        generation: int,
        full_fd: int,
        receive: Callable[[float], bytes | None],
    ) -> None:
        """Starts with what the learner's end said.

        Args:
            free: Slots that may be written.
            reserve: Slots that one batch of steps may fill.
            generation: Of this worker.
            full_fd: The pipe that all workers write into.
            receive: Returns bytes that the learner's end has sent, None after so many seconds; it
                raises `PeerLost` when that is gone.
        """
        self._free = deque(free)
        self._reserve = reserve
        self._generation = generation
        self._full_fd = full_fd
        self._receive = receive
        self._partial = b""

    def acquire(self, count: int) -> list[int]:
        """Takes free slots to write. Never waits: `wait_for_space` keeps some free."""
        if len(self._free) < count:
            raise RuntimeError(f"{count} slots wanted, {len(self._free)} free: too few slots")
        return [self._free.popleft() for _ in range(count)]

    def put(self, slots: Sequence[int]) -> None:
        """Hands full slots over, in this order.

        Raises:
            PeerLost: there is nobody who could read them.
        """
        records = b"".join(RECORD.pack(slot, self._generation) for slot in slots)
        try:
            for start in range(0, len(records), _ATOMIC_NBYTES):
                os.write(self._full_fd, records[start : start + _ATOMIC_NBYTES])
        except BrokenPipeError as error:
            raise PeerLost("the learner is gone") from error

    def wait_for_space(self, timeout_s: float) -> bool:
        """Waits until one more batch of steps has slots to go on in; False after `timeout_s`.

        Raises:
            PeerLost: the learner's end is gone.
        """
        until_s = time.monotonic() + timeout_s
        self.listen(0.0)
        while len(self._free) < self._reserve:
            left_s = until_s - time.monotonic()
            if left_s <= 0.0:
                return False
            self.listen(left_s)
        return True

    def listen(self, timeout_s: float) -> None:
        """Takes the slots that have come back; waits for some for `timeout_s`.

        Raises:
            PeerLost: the learner's end is gone.
        """
        data = self._receive(timeout_s)
        if data is None:
            return
        data = self._partial + data
        whole = len(data) - len(data) % _SLOT.itemsize
        self._partial = data[whole:]
        self._free.extend(np.frombuffer(data[:whole], _SLOT).tolist())
