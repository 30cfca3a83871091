"""Unrolls between machines: who may send how many, and what one looks like on its way."""

from __future__ import annotations

import threading
from collections import Counter

import gymnasium as gym
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from numpy.typing import NDArray

from headrace.algorithms.base import ExperienceSpec, ReplayConfig, ReplaySpec
from headrace.errors import DeadlineExceeded
from headrace.experience.packing import UnrollFormat
from headrace.experience.remote import CreditSlots, HostSlots, free_stretch
from headrace.experience.unrolls import UnrollTable
from headrace.specs import EnvSpec

T = 3


@pytest.mark.parametrize(
    ("free", "most", "stretch"),
    [
        ("111111", 4, (0, 4)),
        ("111111", 9, (0, 6)),
        ("000000", 4, (0, 0)),
        ("110111", 3, (3, 3)),
        ("111011", 2, (4, 2)),  # the smaller gap that is large enough
        ("101101", 3, (2, 2)),  # else the largest
    ],
)
def test_a_host_gets_one_stretch(free: str, most: int, stretch: tuple[int, int]) -> None:
    assert free_stretch(np.array([mark == "1" for mark in free]), most) == stretch


class Hosts:
    """Hosts that act whenever they may, and a learner; all in this thread."""

    def __init__(self, num_envs: int, capacity: int) -> None:
        self.num_envs, self.capacity = num_envs, capacity
        self.credits = Counter[int]()
        self.batch: dict[int, tuple[int, int]] = {}
        self.slots = CreditSlots(num_envs, capacity=capacity, grant=self.grant)
        self.sent = 0

    def grant(self, host: int, count: int) -> None:
        assert count > 0
        self.credits[host] += count

    def join(self, host: int, envs: int, batch: int) -> None:
        self.batch[host] = envs, batch
        self.slots.join(host, num_envs=envs, max_batch=batch)

    def leave(self, host: int) -> None:
        del self.batch[host], self.credits[host]
        self.slots.leave(host)

    def act(self, host: int) -> bool:
        """Sends a whole batch of unrolls, if the host may act."""
        batch = self.batch[host][1]
        if self.credits[host] < batch:
            return False
        for _ in range(batch):
            self.credits[host] -= 1
            slot = self.slots.arrive(host)
            assert slot is not None
            self.slots.put([slot])
            self.sent += 1
        return True


def test_nothing_comes_without_a_credit() -> None:
    hosts = Hosts(num_envs=4, capacity=2)
    hosts.join(0, 4, 4)
    assert hosts.credits == {0: 2 + 4}
    while hosts.credits[0]:
        assert hosts.slots.arrive(0) is not None
        hosts.credits[0] -= 1
    assert hosts.slots.arrive(0) is None


def test_credits_come_back_as_slots_are_read_and_move_to_hosts_that_come() -> None:
    hosts = Hosts(num_envs=4, capacity=4)
    hosts.join(0, 2, 1)
    assert hosts.credits == {0: 5}, "alone it has all of the capacity"
    hosts.join(1, 2, 1)
    assert hosts.credits[1] == 3
    assert all(hosts.act(0) for _ in range(5))
    with hosts.slots.reading(4, timeout_s=0.0):
        assert hosts.credits[0] == 0, "lent, so not free yet"
    assert hosts.credits[0] == 2, "one of its unrolls waits, and half of the capacity is not its"
    hosts.leave(1)
    assert hosts.credits[0] == 4
    assert len(hosts.slots) == 1, "what was sent stays"


def test_a_reader_that_fails_or_refuses() -> None:
    hosts = Hosts(num_envs=2, capacity=3)
    hosts.join(0, 2, 1)
    for _ in range(3):
        hosts.act(0)
    with pytest.raises(ZeroDivisionError), hosts.slots.reading(1, timeout_s=0.0):
        _ = 1 / 0
    with hosts.slots.reading(1, timeout_s=0.0) as lent:
        assert lent == [0], "it gave the oldest back full"
    before = hosts.credits[0]
    too_few = pytest.raises(DeadlineExceeded, match="0 of 1")
    with too_few, hosts.slots.reading(1, timeout_s=0.0, keep=lambda _: False):
        pytest.fail("all were refused")
    assert hosts.slots.stale == 2
    assert hosts.credits[0] == before + 2, "what was refused is free again, though none was read"


def test_what_is_refused_while_a_reader_waits_is_granted_anew() -> None:
    granted: list[int] = []
    at_rest, again = threading.Event(), threading.Event()

    def grant(_: int, count: int) -> None:
        granted.append(count)
        if len(granted) > 1:
            again.set()

    slots = CreditSlots(1, capacity=1, grant=grant, at_rest=at_rest.set)
    slots.join(0, num_envs=1, max_batch=1)

    def read() -> None:
        with slots.reading(1, timeout_s=20.0, keep=lambda slot: slot != 0):
            pass

    reader = threading.Thread(target=read)
    reader.start()
    assert at_rest.wait(60.0)
    slot = slots.arrive(0)
    assert slot == 0
    slots.put([slot])
    assert again.wait(10.0), "the host would wait for a credit, and the reader for the host"
    assert granted == [2, 1]
    slot = slots.arrive(0)
    assert slot == 1
    slots.put([slot])
    reader.join(60.0)
    assert not reader.is_alive()


def test_a_reader_that_waits_is_woken_to_do_what_was_asked() -> None:
    done = threading.Event()
    times: list[None] = []

    def at_rest() -> None:
        times.append(None)
        done.set()

    slots = CreditSlots(1, capacity=1, grant=lambda *_: None, at_rest=at_rest)
    reader = threading.Thread(target=slots.wait_for_full, args=(60.0,))
    reader.start()
    for _ in range(3):
        assert done.wait(60.0)
        done.clear()
        slots.wake()
    slots.join(0, num_envs=1, max_batch=1)
    slot = slots.arrive(0)
    assert slot is not None
    slots.put([slot])
    reader.join(60.0)
    assert not reader.is_alive()
    assert len(times) <= 4, "between, it waits"


@settings(max_examples=100, deadline=None)
@given(
    capacity=st.integers(1, 12),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    calls=st.lists(st.tuples(st.sampled_from(["act", "read", "join", "leave"]), st.integers(0, 3))),
    groups=st.integers(1, 2),
)
def test_hosts_and_learner_cannot_wait_for_each_other(
    capacity: int, sizes: list[int], calls: list[tuple[str, int]], groups: int
) -> None:
    """However hosts come and go: if none may act, a batch is there; and there is a bound."""
    hosts = Hosts(sum(sizes), capacity)
    at = dict[int, int]()  # host of each stretch
    number = 0
    for call, which in [*calls, ("join", 0)]:
        stretch = which % len(sizes)
        if call == "join" and stretch not in at:
            at[stretch], number = number, number + 1
            hosts.join(at[stretch], sizes[stretch], -(-sizes[stretch] // groups))
        elif call == "leave" and stretch in at:
            hosts.leave(at.pop(stretch))
        elif call == "act" and stretch in at:
            hosts.act(at[stretch])
        elif call == "read" and len(hosts.slots) > which:
            with hosts.slots.reading(which + 1, timeout_s=0.0):
                pass
        assert len(hosts.slots) + sum(hosts.credits.values()) <= capacity + sum(sizes)
    for _ in range(3):  # batches as large as may be
        while any([hosts.act(host) for host in at.values()]):
            pass
        with hosts.slots.reading(capacity, timeout_s=0.0) as lent:
            assert len(set(lent)) == capacity


def test_a_host_acts_only_with_credits_for_a_whole_batch() -> None:
    sent: list[int] = []
    grants = [1, 1, 2]

    def listen(_: float) -> None:
        if grants:
            slots.gain(grants.pop(0))

    slots = HostSlots(4, max_batch=2, send=sent.append, listen=listen)
    building = slots.acquire(4)
    assert slots.wait_for_space(60.0)
    assert len(grants) == 1
    fresh = slots.acquire(2)
    slots.put(building[:2])
    assert sent == building[:2]
    assert slots.credits == 0
    assert sorted([*fresh, *slots.acquire(2)]) == [0, 1, 4, 5], "sent, so free"
    assert slots.wait_for_space(0.0)
    slots.credits = 1
    assert not slots.wait_for_space(0.0)


def table(*, for_replay: bool, num_slots: int = 3) -> UnrollTable:
    spec = EnvSpec(
        name="numbers",
        observation_space=gym.spaces.Box(0, 255, (2, 3), np.uint8),
        action_space=gym.spaces.Discrete(4),
        frame_stack=2,
        has_action_mask=True,
    )
    replay = ReplaySpec(
        sequence_steps=T, stride_steps=T, burn_in_steps=0, learned_steps=T, settings=ReplayConfig()
    )
    return UnrollTable(
        spec,
        num_envs=0,
        experience=ExperienceSpec(
            unroll_steps=T, batch_unrolls=1, replay=replay if for_replay else None
        ),
        num_slots=num_slots,
        queue=CreditSlots(num_slots, capacity=1, grant=lambda *_: None),
        recurrent=(torch.zeros(1, 5), torch.zeros(1, 2, 2)),
        device=torch.device("cpu"),
    )


def fill(full: UnrollTable, slot: int) -> None:
    rng = np.random.default_rng(slot)
    for name, column in full.views(slot).items():
        top = 2 if column.dtype == np.bool_ else 4
        column[...] = rng.integers(0, top, column.shape).astype(column.dtype)
        if name == "truncated":
            column[:] = [True, True, False, True]
        elif name == "version":
            column[:] = [0, 1, 1, 3]
    full.of_slot["env_id"][slot], full.of_slot["run_id"][slot] = 7, 8


@pytest.mark.parametrize("for_replay", [False, True])
def test_an_unroll_arrives_as_it_was(for_replay: bool) -> None:
    ours, theirs = table(for_replay=for_replay), table(for_replay=for_replay, num_slots=5)
    fill(ours, 1)
    here, there = UnrollFormat(ours), UnrollFormat(theirs)
    assert here.describe() == there.describe()
    arrays = here.pack(1)
    assert sum(array.nbytes for array in arrays) <= here.nbytes
    there.check(arrays, newest=3)
    there.unpack(4, arrays, env_id=7, run_id=8)
    if for_replay:
        one, two = ours.segments([1]), theirs.segments([4])
        assert len(one.final_frames) == len(arrays[-1]) == 2, "that of row 0 went before"
        assert torch.equal(one.final_frames, two.final_frames)
        assert (one.env_id, one.run_id) == (two.env_id, two.run_id) == (7, 8)
        same = [(one.frames, two.frames), *zip(one.recurrent, two.recurrent, strict=True)]
        same += [(one.columns[name], two.columns[name]) for name in one.columns]
        assert all(torch.equal(a, b) for a, b in same)
        assert all((one.host[name] == two.host[name]).all() for name in one.host)
    first, second = ours.gather([1]), theirs.gather([4])
    for name, a, b in zip(first._fields, first, second, strict=True):
        for x, y in zip(a, b, strict=True) if name == "recurrent" else [(a, b)]:
            assert y is None if x is None else torch.equal(x, y), name


def spoiled(arrays: list[NDArray[np.generic]], place: int) -> list[NDArray[np.generic]]:
    return [array.copy() if at == place else array for at, array in enumerate(arrays)]


@pytest.mark.parametrize("for_replay", [False, True])
def test_what_is_no_unroll_of_this_table_is_refused(for_replay: bool) -> None:
    ours = table(for_replay=for_replay)
    fill(ours, 0)
    packing = UnrollFormat(ours)
    arrays = packing.pack(0)
    packing.check(arrays, newest=3)
    for place, array in enumerate(arrays):
        for other in (array[:-1], array.astype(np.uint16), array[None]):
            changed = [*arrays[:place], other, *arrays[place + 1 :]]
            with pytest.raises(ValueError, match=r"in place of|of versions|not finite"):
                packing.check(changed, newest=3)
        if array.dtype == np.float32:
            changed = spoiled(arrays, place)
            changed[place][-1] = np.nan
            with pytest.raises(ValueError, match="not finite"):
                packing.check(changed, newest=3)
    with pytest.raises(ValueError, match="arrays"):
        packing.check(arrays[:-1], newest=3)
    with pytest.raises(ValueError, match="versions"):
        packing.check(arrays, newest=2)
    ours.views(0)["action"][1] = 4
    with pytest.raises(ValueError, match="a choice of action"):
        packing.check(packing.pack(0), newest=3)
    ours.views(0)["action"][1] = -1
    with pytest.raises(ValueError, match="a choice of action"):
        packing.check(packing.pack(0), newest=3)
