"""The line of waiting blocks: by size, by age, in order, never cut."""

import pytest

from headrace.pools.batcher import Batcher


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def singles(count: int, *, max_envs: int, max_wait_s: float, clock: Clock) -> Batcher:
    return Batcher([1] * count, max_envs=max_envs, max_wait_s=max_wait_s, now_s=clock)


def test_nothing_waits(clock: Clock) -> None:
    batcher = singles(8, max_envs=4, max_wait_s=0.0, clock=clock)
    assert batcher.due_in_s() is None
    assert batcher.take() == []


def test_a_full_batch_is_due_at_once(clock: Clock) -> None:
    batcher = singles(8, max_envs=2, max_wait_s=100.0, clock=clock)
    batcher.add([7])
    assert batcher.take() == []
    batcher.add([3])
    assert batcher.due_in_s() == 0.0
    assert batcher.take() == [7, 3]
    assert len(batcher) == 0


def test_a_small_batch_is_due_by_the_age_of_its_oldest(clock: Clock) -> None:
    batcher = singles(8, max_envs=4, max_wait_s=0.002, clock=clock)
    batcher.add([0])
    clock.now_s = 0.0019
    batcher.add([1])
    assert batcher.take() == []
    assert batcher.due_in_s() == pytest.approx(0.0001)
    clock.now_s = 0.002
    assert batcher.take() == [0, 1]


def test_what_is_left_over_keeps_its_age(clock: Clock) -> None:
    batcher = singles(8, max_envs=2, max_wait_s=1.0, clock=clock)
    batcher.add([0, 1, 2])
    assert batcher.take() == [0, 1]
    assert batcher.take() == []
    clock.now_s = 0.5
    batcher.add([3, 4])
    assert batcher.take() == [2, 3]
    clock.now_s = 1.25
    assert batcher.due_in_s() == pytest.approx(0.25)


def test_a_batch_is_never_larger_than_its_maximum(clock: Clock) -> None:
    batcher = singles(8, max_envs=3, max_wait_s=0.0, clock=clock)
    batcher.add(range(8))
    assert batcher.blocks() == list(range(8))
    assert [batcher.take() for _ in range(4)] == [[0, 1, 2], [3, 4, 5], [6, 7], []]


def test_a_batch_is_full_when_not_even_the_smallest_block_fits(clock: Clock) -> None:
    batcher = Batcher([3, 3, 2], max_envs=7, max_wait_s=1.0, now_s=clock)
    batcher.add([0])
    assert batcher.due_in_s() == 1.0
    batcher.add([1])  # 6 of 7, and the smallest has 2
    assert batcher.due_in_s() == 0.0
    assert len(batcher) == 6
    assert batcher.take() == [0, 1]


def test_a_block_that_does_not_fit_waits_with_its_age(clock: Clock) -> None:
    batcher = Batcher([4, 3, 1], max_envs=6, max_wait_s=1.0, now_s=clock)
    batcher.add([0, 1, 2])
    assert batcher.take() == [0]  # 2 come in the order in which they stand, not around 1
    assert len(batcher) == 4
    assert batcher.take() == []
    clock.now_s = 1.0
    assert batcher.take() == [1, 2]


def test_the_blocks_of_the_dead_leave_the_line(clock: Clock) -> None:
    batcher = Batcher([2, 2, 2], max_envs=4, max_wait_s=1.0, now_s=clock)
    batcher.add([0, 1])
    batcher.drop([1, 2])
    assert batcher.blocks() == [0]
    assert len(batcher) == 2
    assert batcher.take() == []
    batcher.drop([0])
    assert batcher.due_in_s() is None


def test_a_block_larger_than_any_batch_is_refused(clock: Clock) -> None:
    with pytest.raises(ValueError, match="max_envs"):
        Batcher([1, 3], max_envs=2, max_wait_s=0.0, now_s=clock)


def team_line(*, max_envs: int, clock: Clock) -> Batcher:
    """Two teams of three blocks of one environment: 0, 1, 2 and 3, 4, 5."""
    teams = [0, 0, 0, 1, 1, 1]
    return Batcher([1] * 6, max_envs=max_envs, max_wait_s=1.0, teams=teams, now_s=clock)


def test_blocks_of_a_team_stand_together_with_the_age_of_the_first(clock: Clock) -> None:
    batcher = team_line(max_envs=3, clock=clock)
    batcher.add([0])
    clock.now_s = 0.25
    batcher.add([4, 1])
    assert batcher.blocks() == [0, 1, 4]
    batcher.add([3, 2])
    assert batcher.take() == [0, 1, 2]
    assert batcher.blocks() == [4, 3]
    assert batcher.due_in_s() == 1.0


def test_no_team_keeps_another_waiting_for_ever(clock: Clock) -> None:
    batcher = team_line(max_envs=1, clock=clock)
    batcher.add([0, 1, 3])
    served = []
    for _ in range(6):  # whoever is served comes back at once
        served += batcher.take()
        batcher.add(served[-1:])
    assert served == [0, 1, 3, 0, 1, 3]


def test_the_dead_of_a_team_can_come_back(clock: Clock) -> None:
    batcher = team_line(max_envs=2, clock=clock)
    batcher.add([3, 0])
    batcher.drop([3, 4, 5])
    assert batcher.blocks() == [0]
    batcher.add([4, 1])
    assert batcher.take() == [0, 1]
    assert batcher.blocks() == [4]
