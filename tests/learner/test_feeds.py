"""The replay's feed: what comes in, what goes out, who waits, and where priorities go."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.algorithms.base import ExperienceSpec, ReplayConfig, ReplaySpec
from headrace.experience.fifo import SlotQueue
from headrace.experience.limiter import SampleLimiter
from headrace.experience.replay import Replay
from headrace.experience.replay_layout import ReplayLayout
from headrace.experience.unrolls import UnrollTable
from headrace.learner.feeds import ReplayFeed, insert_sizes
from headrace.records import Batch, PolicyStep, Update
from headrace.specs import EnvSpec
from headrace.steps import EnvStep
from headrace.telemetry.metrics import Waits

CPU = torch.device("cpu")
ENVS, PIECE, STEPS, BATCH = 3, 2, 4, 5
SETTINGS = ReplayConfig(replay_capacity=30, replay_min=6, samples_per_insert=2.0)


class Desk:
    """Environments that count, a table, a replay, and the feed between them.

    Row t of environment e shows 1000 e + t, earns ten times that, and is truncated every 9 steps.
    """

    def __init__(self, *, ratio: float = 2.0, priorities: bool = True) -> None:
        spec = EnvSpec(
            name="numbers",
            observation_space=gym.spaces.Box(-1e6, 1e6, (1,), np.float32),
            action_space=gym.spaces.Discrete(3),
        )
        replay = ReplaySpec(
            sequence_steps=STEPS,
            stride_steps=PIECE,
            burn_in_steps=1,
            learned_steps=3,
            settings=SETTINGS,
        )
        self.experience = ExperienceSpec(unroll_steps=PIECE, batch_unrolls=BATCH, replay=replay)
        slots = 150
        self.queue = SlotQueue(slots, capacity=6)
        recurrent = (torch.zeros(1, 1),)
        self.table = UnrollTable(
            spec,
            num_envs=ENVS,
            experience=self.experience,
            num_slots=slots,
            queue=self.queue,
            recurrent=recurrent,
            device=CPU,
        )
        layout = ReplayLayout(
            spec=spec,
            num_envs=ENVS,
            capacity=SETTINGS.replay_capacity,
            segment_steps=PIECE,
            sequence_steps=STEPS,
            stride_steps=PIECE,
            burn_in_steps=1,
            recurrent=recurrent,
            columns=("value", "action_value"),
        )
        self.replay = Replay(layout, device=CPU, priority_exponent=1.0, importance_exponent=1.0)
        self.seen: list[Batch] = []
        self.feed = ReplayFeed(
            self.table,
            self.queue,
            self.replay,
            SampleLimiter(
                ratio,
                min_inserted=SETTINGS.replay_min,
                batch=BATCH,
                max_insert=insert_sizes(self.experience)[1],
            ),
            experience=self.experience,
            device=CPU,
            seed=0,
            initial_priority=self.initial_priority if priorities else None,
        )
        self.time, self.run_id = 0, -1

    def initial_priority(self, batch: Batch) -> Tensor:
        assert batch.inputs.observation.numel() == 0
        assert batch.value is not None
        self.seen.append(batch)
        return batch.value[0] + 1

    def step(self, count: int = 1, *, run_id: int = 0) -> None:
        for _ in range(count):
            number = (1000 * np.arange(ENVS) + self.time).astype(np.float32)
            ended = np.full(ENVS, self.time > 0 and self.time % 9 == 0)
            step = EnvStep(
                env_id=np.arange(ENVS, dtype=np.int32),
                run_id=np.full(ENVS, run_id, np.int64),
                observation=number[:, None].copy(),
                reward=10 * number,
                reset=ended | (run_id != self.run_id),
                terminated=np.zeros(ENVS, np.bool_),
                truncated=ended,
                final_observation=-number[:, None] if ended.any() else None,
            )
            number_T = torch.from_numpy(number)
            self.table.append(
                step,
                torch.from_numpy(step.observation),
                PolicyStep(number_T.long() % 3, -number_T, number_T, action_value=number_T + 0.5),
                previous_action=torch.zeros(ENVS, dtype=torch.int64),
                recurrent=(number_T[:, None],),
                version=self.time,
                bootstrap=number_T + 0.25 if ended.any() else None,
            )
            self.run_id = run_id
            self.time += 1

    def next(self) -> Batch | None:
        return self.feed.next(version=self.time, timeout_s=0.0, waits=Waits())


def check(batch: Batch) -> None:
    """Every row of a batch belongs together, and to one environment."""
    shown = batch.inputs.observation[:, :, 0, 0]
    assert torch.equal(shown[1:] - shown[:-1], torch.ones(STEPS, BATCH))
    assert torch.equal(batch.recurrent[0][:, 0], shown[0])
    assert torch.equal(batch.reward, 10 * shown[1:])
    assert torch.equal(batch.action, shown[:-1].long() % 3)
    assert torch.equal(batch.version, (shown[:-1] % 1000).long())
    truncated = (shown[1:] % 1000) % 9 == 0
    assert torch.equal(batch.truncated, truncated)
    finals = batch.finals
    learned = truncated[1:]
    if finals is None:
        assert not learned.any()
        return
    assert int(finals.valid.sum()) == int(learned.sum())
    for step, column, frame in zip(
        finals.step[finals.valid],
        finals.column[finals.valid],
        finals.observation[finals.valid],
        strict=True,
    ):
        assert batch.truncated[step, column]
        assert frame.item() == -shown[step + 1, column].item()


def test_batches_are_whole_sequences_and_come_as_often_as_they_may() -> None:
    desk = Desk()
    updates = 0
    for _ in range(300):
        desk.step()
        while desk.feed.ready():
            batch = desk.next()
            if batch is not None:
                check(batch)
                updates += 1
    replay = desk.replay
    assert replay.sequences >= SETTINGS.replay_capacity
    assert replay.sampled == updates * BATCH
    assert replay.inserted == ENVS * ((300 - 1) // PIECE - 1)
    due = 2.0 * (replay.inserted - SETTINGS.replay_min)
    assert abs(replay.sampled - due) <= desk.feed.limiter.slack
    row = desk.feed.metrics()
    assert row["samples_per_insert"] == pytest.approx(2.0, rel=0.05)
    assert row["replay_age_updates"] > 0
    assert row["samples_used_share"] == replay.used / replay.inserted
    assert 0.5 < row["samples_used_share"] <= 1.0


def test_before_anything_came_no_share_of_it_was_used() -> None:
    desk = Desk()
    assert "samples_used_share" not in desk.feed.metrics()
    desk.step(7)
    assert desk.next() is not None
    assert 0.0 < desk.feed.metrics()["samples_used_share"] <= BATCH / desk.replay.inserted


def test_batches_that_are_drawn_ahead_are_whole_and_as_often() -> None:
    desk = Desk()
    with ThreadPoolExecutor(1) as threads:
        desk.feed.beside = lambda work: threads.submit(work).result
        updates = 0
        for _ in range(300):
            desk.step()
            while desk.feed.ready():
                batch = desk.next()
                if batch is not None:
                    check(batch)
                    updates += 1
                    drawn = desk.feed._drawn
                    desk.feed.learned(Update({}, torch.tensor(True), torch.rand(BATCH) + 0.5))
                    assert drawn is not None
                    assert len(desk.feed.state_dict()["replay"]["rows"]["host"]["reward"]) > 0
    due = 2.0 * (desk.replay.inserted - SETTINGS.replay_min)
    assert abs(desk.replay.sampled - due) <= desk.feed.limiter.slack
    assert desk.replay.sampled - updates * BATCH in (0, BATCH)
    assert desk.replay.late < desk.replay.sampled / 4


def test_nothing_is_sampled_before_the_least_number_is_there() -> None:
    desk = Desk()
    desk.step(5)  # two pieces and a row: one sequence of each environment
    assert desk.feed.ready()
    assert desk.next() is None
    assert desk.replay.sequences == ENVS
    assert not desk.feed.ready()
    desk.step(2)
    assert desk.next() is not None


def test_inserts_wait_for_samples_and_leave_the_slots_full() -> None:
    desk = Desk()
    desk.step(60)
    before = len(desk.queue)
    assert before > 50
    desk.feed._take_in(waiting=before)
    held = len(desk.queue)
    assert 0 < held < before
    assert not desk.queue.wait_for_space(0.0)
    assert not desk.feed.limiter.may_insert(1)
    assert desk.feed.ready()  # to sample
    sampled = 0
    while desk.next() is not None:
        sampled += 1
    assert len(desk.queue) == 0
    assert sampled > 10


def test_without_a_ratio_neither_side_waits() -> None:
    desk = Desk(ratio=0.0)
    desk.step(60)
    assert desk.next() is not None
    assert len(desk.queue) == 0
    assert all(desk.next() is not None for _ in range(50))


def test_new_sequences_have_the_priority_that_the_acting_policy_says() -> None:
    desk = Desk()
    desk.step(9)
    desk.feed._take_in(waiting=len(desk.queue))
    slots = np.flatnonzero(desk.replay._rings._alive)
    start = desk.replay._rings._start[slots]
    env = slots // desk.replay.layout.slots_per_env
    np.testing.assert_allclose(desk.replay._tree.get(slots), 1000 * env + start + 1)
    # A truncated row has what the policy said of its final observation.
    desk.step(3)
    desk.feed._take_in(waiting=len(desk.queue))
    last = desk.seen[-1]
    assert last.truncated.any()
    told = last.bootstrap[last.truncated]
    assert torch.equal(told % 1000, torch.full_like(told, 9.25))


def test_priorities_of_an_update_go_to_what_was_sampled() -> None:
    desk = Desk(priorities=False)
    desk.step(12)
    assert desk.next() is not None
    drawn = desk.feed._drawn
    assert drawn is not None
    priority = torch.arange(BATCH) + 7.0
    desk.feed.learned(Update({}, torch.tensor(True), priority))
    for slot in np.unique(drawn.slot):
        places = np.flatnonzero(drawn.slot == slot)
        assert desk.replay._tree.get(np.array([slot]))[0] == 7.0 + places[-1]


def test_priorities_that_are_not_finite_are_left_to_the_check_of_the_loss() -> None:
    desk = Desk(priorities=False)
    desk.step(12)
    desk.next()
    before = desk.replay._tree.get(np.arange(desk.replay.layout.num_slots)).copy()
    desk.feed.learned(Update({}, torch.tensor(False), torch.full((BATCH,), float("nan"))))
    after = desk.replay._tree.get(np.arange(desk.replay.layout.num_slots))
    assert np.array_equal(before, after)


def test_an_acting_policy_that_has_diverged_does_not_end_the_run_here() -> None:
    desk = Desk()
    desk.initial_priority = lambda batch: torch.full_like(batch.reward[0], float("nan"))  # type: ignore[method-assign]
    desk.feed._initial_priority = desk.initial_priority
    desk.step(12)
    assert desk.next() is not None


def test_next_returns_in_time_though_unrolls_keep_coming() -> None:
    desk = Desk()

    def always(timeout_s: float) -> bool:
        if len(desk.queue) < 20:
            desk.step()
        return True

    desk.feed._may_sample = lambda: False  # type: ignore[method-assign]
    desk.queue.wait_for_full = always  # type: ignore[method-assign]
    before_s = time.monotonic()
    assert desk.feed.next(version=0, timeout_s=0.05, waits=Waits()) is None
    assert time.monotonic() - before_s < 5.0


def test_a_replay_that_lost_everything_takes_in_again() -> None:
    desk = Desk()
    desk.step(60)
    while desk.next() is not None:
        pass
    desk.replay._rings._alive[:] = False
    desk.replay._rings.sequences = 0
    slots = np.arange(desk.replay.layout.num_slots)
    desk.replay._tree.set(slots, np.zeros(len(slots)))
    desk.feed.limiter.num_inserted += 10_000  # far ahead: by the ratio alone, inserts would wait
    assert desk.next() is None
    desk.step(12, run_id=1)
    assert desk.feed.ready()
    assert desk.next() is not None


def test_a_feed_goes_on_bit_for_bit() -> None:
    one, two = Desk(), Desk()
    one.step(40)
    for _ in range(4):
        one.next()
    two.step(40)  # so that its table stands where the other's does
    with two.queue.reading(len(two.queue) - len(one.queue), timeout_s=0.0):
        pass
    two.feed.load_state_dict(one.feed.state_dict(), streams_go_on=True)
    for _ in range(30):
        one.step()
        two.step()
        a, b = one.next(), two.next()
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert torch.equal(a.inputs.observation, b.inputs.observation)
            assert torch.equal(a.weight, b.weight)  # type: ignore[arg-type]


def test_after_a_resume_without_the_environments_no_sequence_spans_both_sessions() -> None:
    one, two = Desk(), Desk()
    one.step(41)
    one.feed._take_in(waiting=6)
    two.feed.load_state_dict(one.feed.state_dict(), streams_go_on=False)
    inserted = two.replay.inserted
    two.step(5)
    two.feed._take_in(waiting=len(two.queue))
    assert two.replay.inserted == inserted + ENVS  # the first that lies in the new session alone


def test_the_importance_exponent_follows_its_schedule() -> None:
    desk = Desk(ratio=0.0)
    desk.step(40)
    assert desk.next() is not None
    assert desk.replay.importance_exponent == 1.0
    desk.feed._settings = dataclasses.replace(
        SETTINGS, importance_exponent=0.4, importance_exponent_schedule="linear"
    )
    for progress, wanted in ((0.0, 0.4), (0.5, 0.7), (1.0, 1.0)):
        desk.feed.go_on(progress)
        assert desk.replay.importance_exponent == pytest.approx(wanted)
