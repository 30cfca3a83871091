"""Slots go between a learner and its workers; the workers here are in this process."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator

import gymnasium as gym
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from headrace.algorithms.base import ExperienceSpec
from headrace.errors import DeadlineExceeded, PeerLost
from headrace.experience.fifo import SlotQueue
from headrace.experience.shared import (
    RECORD,
    Columns,
    SharedSlots,
    WorkerSlots,
    shares,
    table_nbytes,
)
from headrace.experience.unrolls import Allocate, UnrollTable
from headrace.specs import EnvSpec


class Wires:
    """A learner's end, and workers' ends, with their pipes; and what each side holds."""

    def __init__(self, num_envs: int, workers: int, capacity: int, groups: int = 1) -> None:
        self.shares = shares(num_envs, workers=workers, capacity=capacity, groups=groups)
        self.full_fd, self.full_end = os.pipe()
        self.control = [deque[bytes]() for _ in self.shares]
        self.generation = [-1] * workers
        self.workers: list[WorkerSlots | None] = [None] * workers
        self.building = [deque[int]() for _ in self.shares]
        self.slots = SharedSlots(
            self.shares,
            capacity=capacity,
            full_fd=self.full_fd,
            send=lambda worker, data: self.control[worker].append(data),
        )
        for worker in range(workers):
            self.start(worker)

    def start(self, worker: int) -> None:
        self.generation[worker] += 1
        self.control[worker].clear()
        free = self.slots.begin(worker, self.generation[worker])
        end = WorkerSlots(
            free,
            reserve=self.shares[worker].max_batch,
            generation=self.generation[worker],
            full_fd=self.full_end,
            receive=lambda _: self.control[worker].popleft() if self.control[worker] else None,
        )
        self.workers[worker] = end
        self.building[worker] = deque(end.acquire(self.shares[worker].num_envs))

    def die(self, worker: int) -> None:
        self.workers[worker] = None
        self.building[worker].clear()
        self.slots.end(worker)

    def close(self) -> None:
        os.close(self.full_fd)
        os.close(self.full_end)


@contextlib.contextmanager
def wired(num_envs: int, workers: int, capacity: int) -> Iterator[Wires]:
    wires = Wires(num_envs, workers, capacity)
    try:
        yield wires
    finally:
        wires.close()


@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 50), st.integers(1, 2))
def test_shares_cover_everything_once_and_cannot_lock_up(
    num_envs: int, workers: int, capacity: int, groups: int
) -> None:
    workers = min(workers, num_envs)
    parts = shares(num_envs, workers=workers, capacity=capacity, groups=groups)
    env = slot = 0
    for part in parts:
        assert (part.first_env, part.first_slot) == (env, slot)
        assert part.num_envs >= 1
        assert 1 <= part.max_batch <= part.num_envs
        env, slot = env + part.num_envs, slot + part.num_slots
    assert env == num_envs
    assert max(p.num_envs for p in parts) - min(p.num_envs for p in parts) <= 1
    # A worker that waits has fewer than max_batch free: the others that it does not build are full.
    full = [part.num_slots - part.num_envs - (part.max_batch - 1) for part in parts]
    assert sum(full) >= capacity
    assert sum(part.num_slots - part.num_envs for part in parts) <= capacity + num_envs + workers


def make_table(allocate: Allocate, num_slots: int = 6) -> UnrollTable:
    spec = EnvSpec(
        name="numbers",
        observation_space=gym.spaces.Box(0, 255, (3,), np.uint8),
        action_space=gym.spaces.MultiDiscrete([2, 3]),
        frame_stack=2,
    )
    return UnrollTable(
        spec,
        num_envs=1,
        experience=ExperienceSpec(unroll_steps=2, batch_unrolls=1),
        num_slots=num_slots,
        queue=SlotQueue(num_slots, capacity=2),
        recurrent=(torch.zeros(1, 5),),
        device=torch.device("cpu"),
        allocate=allocate,
    )


def test_two_tables_over_one_block_are_the_same() -> None:
    nbytes = table_nbytes(make_table)
    block = bytearray(nbytes)
    one, two = make_table(Columns(block)), make_table(Columns(block))
    rng = np.random.default_rng(0)
    block[:] = rng.integers(0, 2, nbytes, np.uint8).tobytes()
    first, second = one.gather([3, 1]), two.gather([3, 1])
    for name in first._fields:
        a, b = getattr(first, name), getattr(second, name)
        if name == "recurrent":
            assert torch.equal(a[0], b[0])
        elif a is not None:
            assert torch.equal(a, b)
    assert first.observation.any()


def test_columns_do_not_overlap_and_fit_exactly() -> None:
    columns: dict[str, np.ndarray] = {}
    take = Columns(block := bytearray(table_nbytes(make_table)))

    def recorded(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        columns[name] = take(name, shape, dtype)
        return columns[name]

    make_table(recorded)
    for number, column in enumerate(columns.values(), 1):
        column.view(np.uint8)[...] = number
    for number, column in enumerate(columns.values(), 1):
        assert np.unique(column.view(np.uint8)).tolist() == [number]
    with pytest.raises(TypeError):
        make_table(Columns(bytearray(len(block) - 64)))


def test_the_oldest_of_all_workers_are_read_first_and_go_home() -> None:
    with wired(num_envs=4, workers=2, capacity=4) as wires:
        a, b = wires.workers
        assert a is not None
        assert b is not None
        full = [wires.building[1][0], wires.building[0][0], wires.building[1][1]]
        b.put(full[:1])
        a.put(full[1:2])
        b.put(full[2:])
        assert len(wires.slots) == 3
        with wires.slots.reading(2, timeout_s=0.0) as lent:
            assert lent == full[:2]
            assert not any(wires.control), "lent, so not free yet"
        assert [len(b"".join(sent)) for sent in wires.control] == [4, 4]
        too_few = pytest.raises(DeadlineExceeded, match="1 of 2")
        with too_few, wires.slots.reading(2, timeout_s=0.0):
            pytest.fail("there was only one")
        with pytest.raises(ZeroDivisionError), wires.slots.reading(1, timeout_s=0.0):
            _ = 1 / 0
        with wires.slots.reading(1, timeout_s=0.0) as lent:
            assert lent == full[2:], "a reader that fails gives the slots back full"


def test_slots_that_are_too_old_go_home_unread() -> None:
    with wired(num_envs=4, workers=1, capacity=4) as wires:
        (worker,) = wires.workers
        assert worker is not None
        old, *fresh = list(wires.building[0])[:3]
        worker.put([old, *fresh])
        with wires.slots.reading(2, timeout_s=0.0, keep=lambda slot: slot != old) as lent:
            assert lent == fresh
        assert wires.slots.stale == 1
        assert wires.control[0][0] == old.to_bytes(4, "little")


def test_a_worker_waits_until_one_more_batch_has_slots() -> None:
    with wired(num_envs=2, workers=1, capacity=1) as wires:
        (worker,) = wires.workers
        assert worker is not None
        assert worker.wait_for_space(0.0)
        worker.put(worker.acquire(2))
        assert not worker.wait_for_space(0.0)
        wires.control[0].append(b"\x00\x00")  # a slot's number in two pieces
        assert not worker.wait_for_space(0.0)
        wires.control[0].append(b"\x00\x00")
        assert worker.wait_for_space(0.0)
        with pytest.raises(RuntimeError, match="too few slots"):
            worker.acquire(3)


def test_a_worker_notices_that_the_learner_is_gone() -> None:
    def gone(_: float) -> bytes:
        raise PeerLost("gone")

    reader, writer = os.pipe()
    worker = WorkerSlots([0, 1], reserve=1, generation=0, full_fd=writer, receive=gone)
    with pytest.raises(PeerLost):
        worker.wait_for_space(1.0)
    os.close(reader)
    with pytest.raises(PeerLost):
        worker.put([0])
    os.close(writer)


def test_late_records_of_a_dead_worker_are_ignored() -> None:
    with wired(num_envs=2, workers=1, capacity=2) as wires:
        slot = wires.building[0][0]
        wires.die(0)
        os.write(wires.full_end, RECORD.pack(slot, 0))
        assert len(wires.slots) == 0
        wires.start(0)
        os.write(wires.full_end, RECORD.pack(slot, 0))
        assert len(wires.slots) == 0
        os.write(wires.full_end, RECORD.pack(slot, 1))
        assert len(wires.slots) == 1


class Model:
    """Follows what a learner and its workers do, by what is written into the slots."""

    def __init__(self, wires: Wires) -> None:
        self.wires = wires
        self.content: dict[int, int] = {}  # of slots that are full
        self.waiting: deque[int] = deque()  # contents of full slots, oldest first
        self.written = 0

    def fill(self, index: int, _: int) -> None:
        worker, building = self.wires.workers[index], self.wires.building[index]
        if worker is None or not worker.wait_for_space(0.0):
            return
        (free,) = worker.acquire(1)
        slot = building.popleft()
        assert slot not in self.content, "the worker wrote where the learner reads"
        assert free not in [*self.content, *building, slot]
        building.append(free)
        self.written += 1
        self.content[slot] = self.written
        self.waiting.append(self.written)
        worker.put([slot])

    def listen(self, index: int, _: int) -> None:
        worker = self.wires.workers[index]
        if worker is not None:
            worker.wait_for_space(0.0)

    def read(self, _: int, count: int) -> None:
        if count <= len(self.waiting):
            with self.wires.slots.reading(count, timeout_s=0.0) as lent:
                read = [self.content.pop(slot) for slot in lent]
            assert read == [self.waiting.popleft() for _ in range(count)]

    def look(self, *_: int) -> None:
        assert len(self.wires.slots) == len(self.waiting)

    def fail(self, _: int, count: int) -> None:
        if count <= len(self.waiting):
            with pytest.raises(ZeroDivisionError), self.wires.slots.reading(count, timeout_s=0.0):
                _ = 1 / 0

    def refuse(self, *_: int) -> None:
        if self.waiting:
            oldest = self.waiting.popleft()
            stale = next(slot for slot, number in self.content.items() if number == oldest)
            del self.content[stale]
            reading = self.wires.slots.reading(99, timeout_s=0.0, keep=lambda slot: slot != stale)
            with pytest.raises(DeadlineExceeded), reading:
                pytest.fail("there are not so many")

    def die(self, index: int, _: int) -> None:
        if self.wires.workers[index] is not None:
            self.wires.die(index)

    def start(self, index: int, _: int) -> None:
        if self.wires.workers[index] is None:
            self.wires.start(index)

    def owned(self, index: int) -> list[int]:
        """Returns all slots that a worker has when none is full."""
        self.start(index, 0)
        part, worker = self.wires.shares[index], self.wires.workers[index]
        assert worker is not None
        while self.wires.control[index]:
            worker.listen(0.0)
        free = worker.acquire(part.num_slots - part.num_envs)
        return sorted([*self.wires.building[index], *free])


CALLS = ["fill", "fill", "listen", "look", "read", "fail", "refuse", "die", "start"]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(CALLS), st.integers(0, 2), st.integers(1, 3)), min_size=40)
)
def test_no_slot_has_two_owners_and_none_is_lost(calls: list[tuple[str, int, int]]) -> None:
    with wired(num_envs=7, workers=3, capacity=4) as wires:
        model = Model(wires)
        for call, index, count in calls:
            getattr(model, call)(index, count)
        while model.waiting:
            model.read(0, 1)
        for index, part in enumerate(wires.shares):
            all_of_them = range(part.first_slot, part.first_slot + part.num_slots)
            assert model.owned(index) == list(all_of_them), "one was lost"
