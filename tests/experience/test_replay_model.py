"""The replay against a dictionary that keeps whole trajectories and cuts sequences in Python."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from headrace.experience.replay import LEAST_PRIORITY, Replay, Sample
from headrace.experience.replay_layout import ReplayLayout
from headrace.experience.segments import Segment
from headrace.learner.flattening import flatten, unflatten
from headrace.records import Finals, Unrolls
from headrace.specs import EnvSpec

CPU = torch.device("cpu")
SPACES: dict[str, gym.Space[Any]] = {
    "discrete": gym.spaces.Discrete(300),
    "multi": gym.spaces.MultiDiscrete([3, 9]),
    "box": gym.spaces.Box(-1.0, 1.0, (2,), np.float32),
}
CUTS = [(2, 4, 6), (4, 4, 4), (1, 2, 5), (3, 3, 7), (2, 6, 6), (4, 2, 5), (6, 2, 4), (3, 1, 2)]
"""segment, stride and sequence steps."""
OPERATIONS = {"insert": 0.5, "sample": 0.2, "prioritise": 0.2, "resume": 0.05, "forget": 0.05}
"""How often each is chosen."""


def frame_of(number: int) -> list[int]:
    """Four bytes that say which frame this is; none is all zeros."""
    return [number % 256, number // 256 % 256, number // 65536, 7]


@dataclass
class Row:
    """One row as the stream made it; `number` is unlike that of any other row."""

    number: int
    reset: bool
    terminated: bool
    truncated: bool
    action: Any

    @property
    def final_frame(self) -> list[int]:
        return [*frame_of(self.number)[:3], 9]

    def value(self, name: str) -> float:
        """What a column of float32 or the version holds."""
        scale = {"reward": 1, "log_prob": -2, "value": 3, "action_value": 4, "version": 5}
        return self.number * scale.get(name, 6)

    def mask(self, size: int) -> list[bool]:
        return [bool((self.number >> bit % 8) & 1) for bit in range(size)]


@dataclass
class World:
    """Environments that make rows; and, by number of the row in its ring, every row there was."""

    layout: ReplayLayout
    rng: np.random.Generator
    clock: int = 0
    run_id: dict[int, int] = field(default_factory=dict)
    forgotten: set[int] = field(default_factory=set)
    streams: dict[int, list[tuple[int, list[Row]]]] = field(default_factory=dict)
    alive: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # slot: env, start, gen
    died: dict[int, int] = field(default_factory=dict)  # slot: how many
    priority: dict[int, float] = field(default_factory=dict)
    largest: float = 0.0

    def row(self, env: int, first: bool) -> Row:
        self.clock += 1
        ends = not first and self.rng.random() < 0.2
        life = not first and not ends and self.rng.random() < 0.1
        action = self.layout.spec.action_space.sample()
        truncated = ends and self.rng.random() < 0.5
        return Row(self.clock, first or ends, (ends and not truncated) or life, truncated, action)

    def segments(self, envs: list[int]) -> Segment:
        """Makes one segment per entry of `envs`, in order, and follows them in the model."""
        made = [(self._next(env), self.run_id[env]) for env in envs]
        segment = self._packed(envs, [rows for rows, _ in made])
        return segment._replace(run_id=np.array([run_id for _, run_id in made], np.int64))

    def _next(self, env: int) -> list[Row]:
        steps = self.layout.segment_steps
        new = env not in self.streams or self.rng.random() < 0.1 or env in self.forgotten
        if new:
            self.run_id[env] = self.run_id.get(env, 0) + (env not in self.forgotten)
            self.forgotten.discard(env)
            streams = self.streams.setdefault(env, [])
            begin = streams[-1][0] + len(streams[-1][1]) if streams else 0
            while begin % steps or begin % self.layout.stride_steps:
                begin += 1
            streams.append((begin, [self.row(env, True)]))
        rows = self.streams[env][-1][1]
        rows += [self.row(env, False) for _ in range(steps)]
        self._follow(env)
        return rows[-steps - 1 :]

    def _follow(self, env: int) -> None:
        """Which sequences of this environment are whole, and which lost rows."""
        layout = self.layout
        begin, rows = self.streams[env][-1]
        last = begin + len(rows) - 1
        oldest = last - layout.ring_rows + 1  # the oldest row that is not written over
        for slot, (owner, start, _) in list(self.alive.items()):
            if owner == env and start - max(layout.spec.frame_stack - 1, 1) < oldest:
                del self.alive[slot], self.priority[slot]
                self.died[slot] = self.died.get(slot, 0) + 1
        for start in range(begin, last - layout.sequence_steps + 1, layout.stride_steps):
            if start + layout.sequence_steps > last - layout.segment_steps:
                in_ring = start // layout.stride_steps % layout.slots_per_env
                slot = env * layout.slots_per_env + in_ring
                assert slot not in self.alive
                self.alive[slot] = (env, start, self.died.get(slot, 0))
                self.priority[slot] = self.largest or 1.0

    def _packed(self, envs: list[int], rows: list[list[Row]]) -> Segment:
        layout, spec = self.layout, self.layout.spec
        names = ("log_prob", *layout.columns)
        columns = {name: torch.tensor([[r.value(name) for r in s] for s in rows]) for name in names}
        columns = {name: column.float() for name, column in columns.items()}
        action = np.array([[r.action for r in s] for s in rows], spec.action_dtype)
        columns["action"] = torch.from_numpy(action)
        if spec.has_action_mask:
            mask = [[r.mask(spec.action_mask_size) for r in s] for s in rows]
            columns["action_mask"] = torch.tensor(mask)
        host: dict[str, Any] = {
            name: np.array([[getattr(r, name) for r in s] for s in rows])
            for name in ("reset", "terminated", "truncated")
        }
        host["reward"] = np.array([[r.value("reward") for r in s] for s in rows], np.float32)
        host["version"] = np.array([[r.value("version") for r in s] for s in rows], np.int64)
        at = [(i, t) for i, s in enumerate(rows) for t, r in enumerate(s) if t and r.truncated]
        finals = [rows[i][t] for i, t in at]
        frames = np.array([[frame_of(r.number) for r in s] for s in rows], np.uint8)
        final_frames = np.array([r.final_frame for r in finals], np.uint8).reshape(-1, 4)
        return Segment(
            env_id=np.array(envs, np.int64),
            run_id=np.zeros(len(envs), np.int64),
            frames=torch.from_numpy(frames),
            columns=columns,
            host=host,
            recurrent=self.states([s[0] for s in rows]),
            final_frames=torch.from_numpy(final_frames),
            final_at=np.array(at, np.int64).reshape(-1, 2),
            final_value=torch.tensor([float(r.value("final")) for r in finals]),
            final_mask=self._final_masks(finals),
        )

    def _final_masks(self, rows: list[Row]) -> Tensor | None:
        size = self.layout.spec.action_mask_size
        return torch.tensor([final_mask(r, size) for r in rows]).view(-1, size) if size else None

    def states(self, rows: list[Row]) -> tuple[Tensor, ...]:
        """The recurrent state that was fed to each row."""
        sizes = [part.shape[1] for part in self.layout.recurrent]
        return tuple(torch.tensor([[float(r.number)] * n for r in rows]) + n for n in sizes)

    def names(self) -> Sample:
        """All sequences there are, in any order."""
        slots = self.rng.permutation(sorted(self.alive)).astype(np.int64)
        generation = np.array([self.alive[slot][2] for slot in slots], np.int64)
        return Sample(slots, generation, np.ones(len(slots), np.float32))

    def sequence(self, slot: int) -> list[tuple[Row, Row | None, list[Row]]]:
        """Rows of a sequence, each with the row before and all of its stream up to it."""
        env, start, _ = self.alive[slot]
        begin, rows = next(s for s in reversed(self.streams[env]) if s[0] <= start)
        places = range(start - begin, start - begin + self.layout.sequence_steps + 1)
        return [(rows[at], rows[at - 1] if at else None, rows[: at + 1]) for at in places]

    def stack(self, stream: list[Row]) -> list[list[int]]:
        """The newest K frames of the episode that the last row of `stream` is in."""
        frames = []
        for row in reversed(stream[-self.layout.spec.frame_stack :]):
            frames.append(frame_of(row.number))
            if row.reset:
                break
        empty = [[0] * 4] * (self.layout.spec.frame_stack - len(frames))
        return empty + frames[::-1]


def check_gathered(world: World, sample: Sample, got: Unrolls) -> None:
    spec, burn_in = world.layout.spec, world.layout.burn_in_steps
    names = ("reward", "log_prob", "version", *world.layout.columns)
    flags = ("reset", "terminated", "truncated")
    stored = {name: getattr(got, name).tolist() for name in (*names, *flags, "bootstrap")}
    observation, finals = got.observation.tolist(), []
    for column, slot in enumerate(sample.slot):
        sequence = world.sequence(int(slot))
        for part, expected in zip(got.recurrent, world.states([sequence[0][0]]), strict=True):
            assert torch.equal(part[column], expected[0])
        for t, (row, before, stream) in enumerate(sequence):
            at = (t, column)
            assert observation[t][column] == world.stack(stream)
            for name in flags:
                assert stored[name][t][column] == getattr(row, name)
            for name in names:
                assert stored[name][t][column] == row.value(name)
            assert np.array_equal(got.action[at].numpy(), row.action)
            start = 0.0 if isinstance(spec.action_space, gym.spaces.Box) else -1
            previous = np.full_like(row.action, start) if row.reset else before.action
            assert np.array_equal(got.previous_action[at].numpy(), previous)
            if spec.has_action_mask:
                assert got.action_mask[at].tolist() == row.mask(spec.action_mask_size)
            assert stored["bootstrap"][t][column] == (row.value("final") if row.truncated else 0.0)
            if row.truncated and t > burn_in:
                final = [*world.stack(stream[:-1])[1:], row.final_frame]
                finals.append((t - 1, column, final, final_mask(row, spec.action_mask_size)))
    check_finals(got.finals, finals, len(sample.slot))


def final_mask(row: Row, size: int) -> list[bool]:
    """What is allowed at the final observation: other than at the row, the first of an episode."""
    return [not flag for flag in row.mask(size)]


def check_finals(got: Finals | None, expected: list[tuple[Any, ...]], batch: int) -> None:
    if not expected:
        assert got is None
        return
    count = len(expected)
    assert len(got.step) == -(-count // batch) * batch
    assert got.valid.tolist() == [True] * count + [False] * (len(got.step) - count)
    masks = [[]] * len(got.step) if got.action_mask is None else got.action_mask.tolist()
    shown = got.step.tolist(), got.column.tolist(), got.observation.tolist(), masks
    found = zip(*shown, strict=True)
    assert sorted(list(found)[:count]) == sorted(expected)
    assert not got.step[count:].any()
    assert not got.column[count:].any()


@dataclass
class Driver:
    """A replay and its model, through the same operations."""

    world: World
    replay: Replay
    old: list[Sample] = field(default_factory=list)
    drawn: set[tuple[int, int]] = field(default_factory=set)  # slot and generation
    late: int = 0

    def insert(self, most: int = 6) -> None:
        world, rng = self.world, self.world.rng
        count = int(rng.integers(1, most + 1))
        known = {(slot, *rest) for slot, rest in world.alive.items()}
        segment = world.segments(rng.integers(world.layout.num_envs, size=count).tolist())
        born = self.replay.insert(segment)
        new = {(slot, *rest) for slot, rest in world.alive.items()} - known
        names = zip(born.slot.tolist(), born.generation.tolist(), strict=True)
        assert sorted((slot, generation) for slot, _, _, generation in new) == sorted(names)
        self.old.append(born)

    def check(self) -> None:
        assert self.replay.sequences == len(self.world.alive)
        assert self.replay.used == len(self.drawn)
        if self.world.alive:
            names = self.world.names()
            check_gathered(self.world, names, self.replay.gather(names, CPU))

    def sample(self) -> None:
        world = self.world
        if not world.alive:
            with pytest.raises(ValueError, match="empty"):
                self.replay.sample(3, world.rng)
            return
        sample = self.replay.sample(5, world.rng)
        total = sum(p**0.9 for p in world.priority.values())
        chance = np.array([world.priority[slot] ** 0.9 / total for slot in sample.slot.tolist()])
        weight = (len(world.alive) * chance) ** -0.6
        np.testing.assert_allclose(sample.weight, weight / weight.max(), rtol=1e-5)
        assert [world.alive[s][2] for s in sample.slot.tolist()] == sample.generation.tolist()
        self.drawn |= set(zip(sample.slot.tolist(), sample.generation.tolist(), strict=True))
        self.old.append(sample)

    def prioritise(self) -> None:
        """Sets priorities of a sample that may be old, some of its sequences gone."""
        world = self.world
        if not self.old:
            return
        sample = self.old[int(world.rng.integers(len(self.old)))]
        priority = np.round(10.0 ** world.rng.uniform(-3, 1, len(sample.slot)), 4)
        priority[world.rng.random(len(priority)) < 0.1] = 0.0
        late = 0
        for slot, generation, value in zip(sample.slot, sample.generation, priority, strict=True):
            if int(slot) in world.alive and world.alive[int(slot)][2] == generation:
                world.priority[int(slot)] = max(value, LEAST_PRIORITY)
                world.largest = max(world.largest, world.priority[int(slot)])
            else:
                late += 1
        assert self.replay.set_priority(sample.slot, sample.generation, priority) == late
        self.late += late
        assert self.replay.late == self.late

    def forget(self) -> None:
        if self.world.rng.random() < 0.3:
            self.replay.forget_streams()
            self.world.forgotten = set(self.world.streams)

    def resume(self) -> None:
        """Goes on with another replay that has read what this one wrote."""
        self.replay = resumed(self.replay)


def made(layout: ReplayLayout) -> Replay:
    return Replay(layout, device=CPU, priority_exponent=0.9, importance_exponent=0.6)


def resumed(replay: Replay) -> Replay:
    other = made(replay.layout)
    tensors, skeleton = flatten(replay.state_dict())
    # As a file would: nothing that the writer does later may change what was read.
    other.load_state_dict(unflatten({name: t.clone() for name, t in tensors.items()}, skeleton))
    return other


def layout_of(
    cut: tuple[int, int, int], *, num_envs: int, capacity: int, depth: int, kind: str, burn_in: int
) -> ReplayLayout:
    spec = EnvSpec(
        name="model",
        observation_space=gym.spaces.Box(0, 255, (4,), np.uint8),
        action_space=SPACES[kind],
        frame_stack=depth,
        has_action_mask=kind == "multi",
    )
    segment, stride, sequence = cut
    return ReplayLayout(
        spec=spec,
        num_envs=num_envs,
        capacity=capacity,
        segment_steps=segment,
        stride_steps=stride,
        sequence_steps=sequence,
        burn_in_steps=min(burn_in, sequence - 1),
        recurrent=(torch.zeros(1, 3), torch.zeros(1, 2)) if segment <= stride else (),
        columns=("value", "action_value") if kind == "discrete" else (),
    )


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(CUTS),
    st.integers(1, 3),
    st.integers(1, 8),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(sorted(SPACES)),
    st.integers(0, 3),
    st.integers(0, 2**32 - 1),
)
def test_any_order_of_operations(
    cut: tuple[int, int, int],
    num_envs: int,
    capacity: int,
    depth: int,
    kind: str,
    burn_in: int,
    seed: int,
) -> None:
    layout = layout_of(
        cut, num_envs=num_envs, capacity=capacity, depth=depth, kind=kind, burn_in=burn_in
    )
    rng = np.random.default_rng(seed)
    SPACES[kind].seed(seed)
    driver = Driver(World(layout, rng), made(layout))
    for _ in range(40):
        step = rng.choice(list(OPERATIONS), p=list(OPERATIONS.values()))
        getattr(driver, step)()
        driver.check()
