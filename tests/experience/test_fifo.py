"""A slot has one owner, always: the writer, the queue or a reader."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from headrace.errors import DeadlineExceeded
from headrace.experience.fifo import SlotQueue


def test_the_oldest_are_read_first() -> None:
    queue = SlotQueue(6, capacity=6)
    slots = queue.acquire(5)
    queue.put(slots[3:])
    queue.put(slots[:3])
    with queue.reading(2, timeout_s=0.0) as lent:
        assert lent == slots[3:]
    with queue.reading(3, timeout_s=0.0) as lent:
        assert lent == slots[:3]
    assert sorted(queue.state()["free"]) == list(range(6))


def test_a_slot_being_read_is_neither_free_nor_full() -> None:
    queue = SlotQueue(2, capacity=2)
    queue.put(queue.acquire(2))
    with queue.reading(1, timeout_s=0.0) as lent:
        assert lent[0] not in queue.state()["free"] + queue.state()["full"]
        with pytest.raises(RuntimeError, match="0 free"):
            queue.acquire(1)
    assert queue.acquire(1) == lent


def test_a_reader_that_fails_gives_the_slots_back_full_and_in_front() -> None:
    queue = SlotQueue(5, capacity=5)
    queue.put(queue.acquire(4))
    with pytest.raises(KeyboardInterrupt), queue.reading(2, timeout_s=0.0):
        raise KeyboardInterrupt
    assert queue.state() == {"free": [4], "full": [0, 1, 2, 3]}


def test_too_few_are_left_where_they_are() -> None:
    queue = SlotQueue(4, capacity=4)
    queue.put(queue.acquire(2))
    before = queue.state()
    with pytest.raises(DeadlineExceeded, match="2 of 3"), queue.reading(3, timeout_s=0.0):
        pytest.fail("there were only two")
    assert queue.state() == before
    assert len(queue) == 2


def test_space_is_what_is_below_the_capacity() -> None:
    queue = SlotQueue(4, capacity=2)
    slots = queue.acquire(3)
    queue.put(slots[:1])
    assert queue.wait_for_space(0.0)
    queue.put(slots[1:])
    assert not queue.wait_for_space(0.0)
    with queue.reading(2, timeout_s=0.0):
        assert queue.wait_for_space(0.0)
    assert queue.wait_for_space(0.0)


def test_a_waiting_writer_is_woken_by_the_reader() -> None:
    queue = SlotQueue(1, capacity=1)
    queue.put(queue.acquire(1))
    answer: list[bool] = []
    writer = threading.Thread(target=lambda: answer.append(queue.wait_for_space(30.0)))
    writer.start()
    with queue.reading(1, timeout_s=0.0):
        pass
    writer.join(30.0)
    assert answer == [True]


def test_a_restored_queue_is_as_it_was() -> None:
    queue = SlotQueue(5, capacity=5)
    queue.put(queue.acquire(3)[::-1])
    twin = SlotQueue(5, capacity=5)
    twin.restore(queue.state())
    assert twin.state() == queue.state() == {"free": [3, 4], "full": [2, 1, 0]}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["acquire", "put", "read", "fail"]), st.integers(1, 4)),
        max_size=40,
    )
)
def test_any_order_of_calls_equals_the_model(calls: list[tuple[str, int]]) -> None:
    queue = SlotQueue(6, capacity=3)
    free, full, mine = deque(range(6)), deque[int](), list[int]()
    for call, count in calls:
        if call == "acquire" and count <= len(free):
            taken = [free.popleft() for _ in range(count)]
            assert queue.acquire(count) == taken
            mine += taken
        elif call == "put":
            given_, mine = mine[:count], mine[count:]
            queue.put(given_)
            full.extend(given_)
        elif call == "read" and count <= len(full):
            with queue.reading(count, timeout_s=0.0) as lent:
                assert lent == [full.popleft() for _ in range(count)]
            free.extend(lent)
        elif call == "fail" and count <= len(full):
            with pytest.raises(ZeroDivisionError), queue.reading(count, timeout_s=0.0):
                _ = 1 / 0
        assert queue.state() == {"free": list(free), "full": list(full)}
        assert queue.wait_for_space(0.0) == (len(full) < 3)
        assert sorted([*free, *full, *mine]) == list(range(6))


def test_threads_neither_lose_nor_double_a_slot() -> None:
    rounds, batch = 2000, 2
    queue = SlotQueue(8, capacity=4)
    written: deque[tuple[int, int]] = deque()  # (slot, what was written), in the order of put
    content = [-1] * 8

    def write() -> None:
        for number in range(rounds * batch):
            assert queue.wait_for_space(30.0)
            (slot,) = queue.acquire(1)
            content[slot] = number
            written.append((slot, number))
            queue.put([slot])

    with ThreadPoolExecutor(1) as threads:
        writer = threads.submit(write)
        for turn in range(rounds):
            if turn % 5 == 0:
                with pytest.raises(ZeroDivisionError), queue.reading(batch, timeout_s=30.0):
                    _ = 1 / 0
            with queue.reading(batch, timeout_s=30.0) as lent:
                for offset, slot in enumerate(lent):
                    assert written.popleft() == (slot, turn * batch + offset)
                    assert content[slot] == turn * batch + offset
        writer.result(30.0)
    assert sorted(queue.state()["free"]) == list(range(8))


def test_slots_that_a_reader_refuses_are_freed_and_counted() -> None:
    queue = SlotQueue(6, capacity=6)
    queue.put(queue.acquire(5))
    with queue.reading(2, timeout_s=0.0, keep=lambda slot: slot % 2 == 1) as lent:
        assert lent == [1, 3]
    assert queue.stale == 3
    assert sorted(queue.state()["free"]) == list(range(6))


def test_a_reader_waits_until_enough_are_fresh() -> None:
    queue = SlotQueue(4, capacity=4)
    queue.put(queue.acquire(2))
    refused = pytest.raises(DeadlineExceeded, match="1 of 2")
    with refused, queue.reading(2, timeout_s=0.0, keep=lambda slot: slot == 1):
        pytest.fail("only one was fresh")
    queue.put(queue.acquire(1))
    with queue.reading(2, timeout_s=0.0, keep=lambda _: True) as lent:
        assert lent == [1, 2]
