"""Unrolls against a plain model of the whole stream: every step carries its own number."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import gymnasium as gym
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from headrace.algorithms.base import ExperienceSpec
from headrace.experience.fifo import SlotQueue
from headrace.experience.unrolls import UnrollTable
from headrace.learner.batches import align
from headrace.records import PolicyStep, Unrolls
from headrace.specs import EnvSpec
from headrace.steps import EnvStep

CPU = torch.device("cpu")


@dataclass
class Row:
    """What one row must hold, worked out from its own number alone."""

    number: int
    run_id: int
    reset: bool
    terminated: bool
    truncated: bool
    stack: list[list[int]]


@dataclass
class Stream:
    """Environments whose every field says which environment and which step it is, and the model."""

    num_envs: int
    frame_stack: int
    unroll_steps: int
    clock: int = 0
    dropped: int = 0
    run_id: dict[int, int] = field(default_factory=dict)
    frames: dict[int, list[int]] = field(default_factory=dict)
    under_way: dict[int, list[Row]] = field(default_factory=dict)
    full: list[list[Row]] = field(default_factory=list)

    def arrive(
        self, env_ids: list[int], resets: set[int] = frozenset(), restarted: set[int] = frozenset()
    ) -> list[Row]:
        """Makes the next row of each environment, and follows it in the model."""
        self.clock += 1
        return [self._row(env, env in resets, env in restarted) for env in env_ids]

    def _row(self, env: int, ends: bool, restarted: bool) -> Row:
        number = 1 + env + self.num_envs * self.clock
        is_new = restarted or env not in self.run_id
        if is_new:
            self.run_id[env] = self.run_id.get(env, 0) + 1
            self.dropped += bool(self.under_way.get(env))
            self.under_way[env] = []
        if is_new or ends:
            self.frames[env] = []
        frames = self.frames[env]
        frames.append(number)
        newest = frames[-self.frame_stack :]
        stack = [[0, 0]] * (self.frame_stack - len(newest)) + [[n, -n] for n in newest]
        # A restart is a reset alone; an end is a truncation at odd numbers.
        row = Row(
            number=number,
            run_id=self.run_id[env],
            reset=is_new or ends,
            terminated=ends and not is_new and number % 2 == 0,
            truncated=ends and not is_new and number % 2 == 1,
            stack=stack,
        )
        rows = self.under_way[env]
        rows.append(row)
        if len(rows) == self.unroll_steps + 1:
            self.full.append(rows)
            self.under_way[env] = [row]
        return row


def make_table(stream: Stream, *, num_slots: int = 200) -> UnrollTable:
    spec = EnvSpec(
        name="numbers",
        observation_space=gym.spaces.Box(-1e6, 1e6, (2,), np.float32),
        action_space=gym.spaces.Discrete(3),
        frame_stack=stream.frame_stack,
    )
    return UnrollTable(
        spec,
        num_envs=stream.num_envs,
        experience=ExperienceSpec(unroll_steps=stream.unroll_steps, batch_unrolls=1),
        num_slots=num_slots,
        queue=SlotQueue(num_slots, capacity=num_slots),
        recurrent=(torch.zeros(1, 3), torch.zeros(1, 2, 2)),
        device=CPU,
    )


def recurrent_of(number: Tensor) -> tuple[Tensor, Tensor]:
    """Recurrent state that was fed to the rows of these numbers."""
    x = number.float()
    return x[:, None] + torch.tensor([0.0, 0.25, 0.5]), -x[:, None, None].expand(-1, 2, 2) * 2


def append(table: UnrollTable, env_ids: list[int], rows: list[Row]) -> None:
    number = np.array([row.number for row in rows])
    tensor = torch.from_numpy(number)
    frames = np.stack([number, -number], axis=1).astype(np.float32)
    flags = {
        name: np.array([getattr(row, name) for row in rows])
        for name in ("reset", "terminated", "truncated")
    }
    step = EnvStep(
        env_id=np.array(env_ids, np.int32),
        run_id=np.array([row.run_id for row in rows], np.int64),
        observation=frames,
        reward=(number * 10).astype(np.float32),
        final_observation=None,
        **flags,
    )
    table.append(
        step,
        torch.from_numpy(frames),
        PolicyStep(tensor * 3, tensor.float() * 5, tensor.float() * 7),
        previous_action=torch.where(torch.from_numpy(flags["reset"]), -1, tensor * 11),
        recurrent=recurrent_of(tensor),
        version=int(number[0]),
        bootstrap=tensor.float() * 13 if flags["truncated"].any() else None,
    )
    # Whoever gave these arrays may write in them now.
    frames[:], step.reward[:], flags["reset"][:] = -7, -7, True


def assert_unroll(unrolls: Unrolls, column: int, rows: list[Row], env: int, num_envs: int) -> None:
    numbers = torch.tensor([row.number for row in rows])
    assert all((row.number - 1) % num_envs == env for row in rows)
    assert len({row.run_id for row in rows}) == 1
    assert torch.equal(
        unrolls.observation[:, column], torch.tensor([row.stack for row in rows]).float()
    )
    for name in ("reset", "terminated", "truncated"):
        wanted = torch.tensor([getattr(row, name) for row in rows])
        assert torch.equal(getattr(unrolls, name)[:, column], wanted), name
    reset, truncated = unrolls.reset[:, column], unrolls.truncated[:, column]
    assert torch.equal(unrolls.reward[:, column], numbers.float() * 10)
    assert torch.equal(unrolls.action[:, column], numbers * 3)
    assert torch.equal(unrolls.log_prob[:, column], numbers.float() * 5)
    assert torch.equal(unrolls.previous_action[:, column], torch.where(reset, -1, numbers * 11))
    assert torch.equal(unrolls.bootstrap[:, column][truncated], (numbers.float() * 13)[truncated])
    for part, fed in zip(unrolls.recurrent, recurrent_of(numbers[:1]), strict=True):
        assert torch.equal(part[column], fed[0])


def assert_equals_model(table: UnrollTable, stream: Stream) -> None:
    full = table.queue.state()["full"]
    assert len(full) == len(stream.full)
    if full:
        unrolls = table.gather(full)
        for column, rows in enumerate(stream.full):
            env = (rows[0].number - 1) % stream.num_envs
            assert_unroll(unrolls, column, rows, env, stream.num_envs)
    assert table.dropped_unrolls == stream.dropped
    assert table.unfinished() == sum(bool(rows) for rows in stream.under_way.values())


@pytest.mark.parametrize("frame_stack", [1, 4])
@pytest.mark.parametrize("unroll_steps", [1, 2, 5])
def test_unrolls_overlap_by_one_row_and_stacks_are_what_the_server_saw(
    frame_stack: int, unroll_steps: int
) -> None:
    stream = Stream(num_envs=2, frame_stack=frame_stack, unroll_steps=unroll_steps)
    table = make_table(stream)
    # Episodes end inside an unroll, at a row 0, and in the frames before one.
    for time in range(8 * unroll_steps + 1):
        append(table, [0, 1], stream.arrive([0, 1], resets={0} if time % 7 == 5 else {1}))
        assert_equals_model(table, stream)
    of_env_0 = [rows for rows in stream.full if (rows[0].number - 1) % 2 == 0]
    assert len(of_env_0) == 8
    for earlier, later in pairwise(of_env_0):
        assert earlier[-1].number == later[0].number


def test_an_action_meets_the_reward_and_the_end_that_came_after_it() -> None:
    stream = Stream(num_envs=1, frame_stack=1, unroll_steps=6)
    table = make_table(stream)
    for time in range(7):
        append(table, [0], stream.arrive([0], resets={0} if time in (2, 5) else set()))
    number = torch.tensor([row.number for row in stream.full[0]])
    assert number.tolist() == [2, 3, 4, 5, 6, 7, 8]
    batch = align(table.gather(table.queue.state()["full"]))
    assert batch.action[:, 0].tolist() == (number[:-1] * 3).tolist()
    assert batch.log_prob[:, 0].tolist() == (number[:-1] * 5).tolist()
    assert batch.version[:, 0].tolist() == number[:-1].tolist()
    # The raw reward of a step that ended an episode is that of its action.
    assert batch.reward[:, 0].tolist() == (number[1:] * 10).tolist()
    assert batch.terminated[:, 0].tolist() == [False, True, False, False, False, False]
    assert batch.truncated[:, 0].tolist() == [False, False, False, False, True, False]
    assert batch.bootstrap[:, 0].tolist() == [0, 0, 0, 0, 7 * 13, 0]
    # The network does not see the reward of the episode before.
    assert batch.inputs.reward[:, 0].tolist() == [0, 30, 0, 50, 60, 0, 80]
    assert batch.inputs.previous_action[:, 0].tolist() == [-1, 33, -1, 55, 66, -1, 88]
    assert batch.inputs.observation.shape == (7, 1, 1, 2)


@st.composite
def streams(draw: st.DrawFn) -> tuple[Stream, list[tuple[list[int], set[int], set[int]]]]:
    num_envs = draw(st.integers(1, 4))
    stream = Stream(
        num_envs=num_envs,
        frame_stack=draw(st.sampled_from([1, 2, 4])),
        unroll_steps=draw(st.integers(1, 5)),
    )
    envs = st.integers(0, num_envs - 1)
    batches = draw(
        st.lists(
            st.tuples(
                st.lists(envs, min_size=1, max_size=num_envs, unique=True),
                st.sets(envs, max_size=2),
                st.one_of(st.just(set()), st.sets(envs, max_size=1)),
            ),
            min_size=1,
            max_size=40,
        )
    )
    return stream, batches


@settings(max_examples=60, deadline=None)
@given(streams())
def test_any_stream_equals_the_model(
    drawn: tuple[Stream, list[tuple[list[int], set[int], set[int]]]],
) -> None:
    stream, batches = drawn
    table = make_table(stream)
    for env_ids, resets, restarted in batches:
        append(table, env_ids, stream.arrive(env_ids, resets, restarted))
    assert_equals_model(table, stream)


def test_slots_are_written_again_and_again() -> None:
    stream = Stream(num_envs=3, frame_stack=4, unroll_steps=3)
    table = make_table(stream, num_slots=8)
    rng = np.random.default_rng(0)
    for _ in range(200):
        append(table, [2, 0, 1], stream.arrive([2, 0, 1], resets=set(rng.integers(0, 9, 2))))
        assert_equals_model(table, stream)
        if stream.full:
            with table.queue.reading(len(stream.full), timeout_s=0.0):
                stream.full.clear()
    assert table.dropped_unrolls == 0


def test_a_restart_drops_the_unfinished_unroll_of_one_environment() -> None:
    stream = Stream(num_envs=2, frame_stack=4, unroll_steps=4)
    table = make_table(stream)
    for time in range(12):
        append(table, [0, 1], stream.arrive([0, 1], restarted={1} if time == 6 else set()))
    assert table.dropped_unrolls == 1
    assert_equals_model(table, stream)


def test_a_saved_table_goes_on_where_it_was() -> None:
    stream = Stream(num_envs=2, frame_stack=4, unroll_steps=3)
    table = make_table(stream)
    for time in range(8):
        append(table, [0, 1], stream.arrive([0, 1], resets={1} if time == 6 else set()))
    twin = make_table(stream)
    for _ in range(3):
        append(twin, [1, 0], Stream(2, 4, 3, clock=900).arrive([1, 0]))
    twin.load_state_dict(table.state_dict())
    assert_equals_model(twin, stream)
    for time in range(8):
        append(twin, [0, 1], stream.arrive([0, 1], resets={0} if time == 1 else set()))
    assert_equals_model(twin, stream)


@pytest.mark.parametrize(
    "action_space",
    [
        gym.spaces.MultiDiscrete([3, 5]),
        gym.spaces.Box(-2, 2, (3,), np.float32),
        gym.spaces.Discrete(4),
    ],
)
def test_actions_of_any_shape_and_masks_go_through(action_space: gym.Space) -> None:
    masked = not isinstance(action_space, gym.spaces.Box)
    spec = EnvSpec(
        name="numbers",
        observation_space=gym.spaces.Box(-1e6, 1e6, (2,), np.float32),
        action_space=action_space,
        has_action_mask=masked,
    )
    made: dict[str, np.ndarray] = {}

    def allocate(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        made[name] = np.zeros(shape, dtype)
        return made[name]

    queue = SlotQueue(4, capacity=4)
    table = UnrollTable(
        spec,
        num_envs=1,
        experience=ExperienceSpec(unroll_steps=2, batch_unrolls=1),
        num_slots=4,
        queue=queue,
        recurrent=(),
        device=CPU,
        allocate=allocate,
    )
    action_space.seed(1)
    actions = [torch.from_numpy(np.array(action_space.sample())[None]) for _ in range(3)]
    masks = [torch.rand(1, spec.action_mask_size) < 0.5 for _ in range(3)] if masked else None
    for number in range(3):
        step = EnvStep(
            env_id=np.zeros(1, np.int32),
            run_id=np.zeros(1, np.int64),
            observation=np.zeros((1, 2), np.float32),
            reward=np.zeros(1, np.float32),
            reset=np.zeros(1, np.bool_),
            terminated=np.zeros(1, np.bool_),
            truncated=np.zeros(1, np.bool_),
            final_observation=None,
        )
        table.append(
            step,
            torch.full((1, 2), float(number)),
            PolicyStep(actions[number], torch.zeros(1), torch.zeros(1)),
            previous_action=actions[number - 1],
            recurrent=(),
            version=7 + number,
            bootstrap=None,
            action_mask=masks[number] if masks else None,
        )
    [full] = queue.state()["full"]
    unrolls = table.gather([full])
    assert torch.equal(unrolls.action, torch.stack(actions))
    assert torch.equal(unrolls.previous_action, torch.stack([actions[-1], *actions[:2]]))
    assert masked == (unrolls.action_mask is not None)
    if masks:
        assert torch.equal(unrolls.action_mask, torch.stack(masks))
    assert table.oldest_version(full) == 7
    assert np.array_equal(made["frames"][:3, 0], [0, 1, 2]), "storage is what was given"


def test_ends_of_unrolls_stay_spread_when_environments_are_killed() -> None:
    num_envs, unroll_steps, batch_unrolls = 32, 20, 4
    stream = Stream(num_envs, frame_stack=3, unroll_steps=unroll_steps)
    table = make_table(stream)
    table.spreads_ends = True
    rng = np.random.default_rng(3)
    silent_until, restarted = np.zeros(4, np.int64), [False] * 4
    came: dict[tuple[int, int], list[list[int]]] = {}
    rows: dict[tuple[int, int], list[Row]] = {}
    ends = np.zeros(1000, np.int64)
    for step in range(1000):
        for group in range(4):  # workers of eight environments each
            if step >= silent_until[group] and rng.random() < 0.01:
                silent_until[group], restarted[group] = step + rng.integers(1, 70), True
            if step < silent_until[group]:
                continue
            envs = list(range(8 * group, 8 * group + 8))
            resets = {env for env in envs if rng.random() < 0.02}
            made = stream.arrive(envs, resets, set(envs) if restarted[group] else set())
            restarted[group] = False
            append(table, envs, made)
            for env, row in zip(envs, made, strict=True):
                rows.setdefault((env, row.run_id), []).append(row)
        if len(table.queue):
            with table.queue.reading(len(table.queue), timeout_s=0.0) as slots:
                ends[step] = len(slots)
                unrolls = table.gather(slots)
                for column, slot in enumerate(slots):
                    key = int(table.of_slot["env_id"][slot]), int(table.of_slot["run_id"][slot])
                    came.setdefault(key, []).append(unrolls.action[:, column].tolist())
                    by_number = {row.number: row for row in rows[key]}
                    stacks = unrolls.observation[:, column].tolist()
                    numbers = [action // 3 for action in unrolls.action[:, column].tolist()]
                    assert stacks == [by_number[number].stack for number in numbers]
    assert ends.max() <= batch_unrolls
    assert ends.sum() == sum(map(len, came.values())) > 900
    for key, unrolls_of_run in came.items():
        numbers = [row.number * 3 for row in rows[key]]
        left_out = numbers.index(unrolls_of_run[0][0])
        assert left_out < unroll_steps
        # What follows is every row, once as a step that is learned from.
        for index, unroll in enumerate(unrolls_of_run):
            start = left_out + index * unroll_steps
            assert unroll == numbers[start : start + unroll_steps + 1]
        last = left_out + len(unrolls_of_run) * unroll_steps
        assert len(numbers) - last <= unroll_steps + 1, "an unroll is missing"


def test_without_spreading_all_unrolls_end_together() -> None:
    stream = Stream(8, frame_stack=1, unroll_steps=5)
    table = make_table(stream)
    for _ in range(6):
        assert len(table.queue) == 0
        append(table, list(range(8)), stream.arrive(list(range(8))))
    assert len(table.queue) == 8
