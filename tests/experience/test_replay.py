"""What the replay promises in numbers: frequencies, weights, capacity, bytes; what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from headrace.errors import ConfigError
from headrace.experience.replay import Replay, Sample
from headrace.experience.replay_layout import ReplayLayout
from headrace.experience.segments import Segment
from headrace.learner.flattening import flatten, unflatten
from headrace.specs import EnvSpec

CPU = torch.device("cpu")


def layout_of(shape: tuple[int, ...] = (2,), depth: int = 1, **settings: Any) -> ReplayLayout:
    spec = EnvSpec(
        name="numbers",
        observation_space=gym.spaces.Box(0, 255, shape, np.uint8),
        action_space=gym.spaces.Discrete(18),
        frame_stack=depth,
    )
    usual = {"num_envs": 3, "capacity": 12, "segment_steps": 2}
    cut = {"sequence_steps": 6, "stride_steps": 4}
    return ReplayLayout(spec=spec, **{**usual, **cut, **settings})


def made(layout: ReplayLayout, priority_exponent: float = 0.9, **settings: Any) -> Replay:
    return Replay(
        layout,
        device=CPU,
        priority_exponent=priority_exponent,
        importance_exponent=0.6,
        **settings,
    )


def segment_of(layout: ReplayLayout, envs: list[int], run_id: int = 0) -> Segment:
    """Segments of which all but the first reset is zero."""
    n, rows = len(envs), layout.segment_steps + 1
    frame = layout.spec.observation_space.shape
    reset = np.zeros((n, rows), np.bool_)
    reset[:, 0] = True
    flags = {name: np.zeros((n, rows), np.bool_) for name in ("terminated", "truncated")}
    numbers = {name: torch.zeros(n, rows) for name in ("log_prob", *layout.columns)}
    return Segment(
        env_id=np.array(envs, np.int64),
        run_id=np.full(n, run_id, np.int64),
        frames=torch.zeros(n, rows, *frame, dtype=torch.uint8),
        columns={"action": torch.zeros(n, rows, dtype=torch.int64), **numbers},
        host={
            "reward": np.zeros((n, rows), np.float32),
            "reset": reset,
            "version": np.zeros((n, rows), np.int64),
            **flags,
        },
        recurrent=tuple(part.expand(n, *part.shape[1:]) for part in layout.recurrent),
        final_frames=torch.zeros(0, *frame, dtype=torch.uint8),
        final_at=np.zeros((0, 2), np.int64),
        final_value=torch.zeros(0),
    )


def random_segment(layout: ReplayLayout, envs: list[int], rng: np.random.Generator) -> Segment:
    """Any numbers in every field; episodes start where they will, and each may meet the clock."""
    plain = segment_of(layout, envs)
    host = plain.host
    for name in ("terminated", "truncated"):
        host[name] = rng.random(host[name].shape) < 0.2
    host["reset"][:, 1:] = rng.random(host["reset"][:, 1:].shape) < 0.3
    host["reward"] = rng.random(host["reward"].shape, np.float32)
    host["truncated"][:, 0] = False
    at = np.argwhere(host["truncated"])

    def numbers(part: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(rng.integers(1, 18, part.shape)).to(part.dtype)

    return plain._replace(
        frames=numbers(plain.frames),
        columns={name: numbers(column) for name, column in plain.columns.items()},
        recurrent=tuple(numbers(part) for part in plain.recurrent),
        final_frames=numbers(torch.zeros(len(at), *plain.frames.shape[2:], dtype=torch.uint8)),
        final_at=at,
        final_value=numbers(torch.zeros(len(at))),
    )


RICH: dict[str, Any] = {"depth": 3, "burn_in_steps": 2, "columns": ("value",)}
RICH["recurrent"] = (torch.zeros(1, 5),)


def played(replay: Replay, seed: int, inserts: int = 60) -> Replay:
    """Writes over every ring several times, with draws and priorities, some of them late."""
    rng = np.random.default_rng(seed)
    old = None
    for _ in range(inserts):
        envs = rng.integers(replay.layout.num_envs, size=4).tolist()
        replay.insert(random_segment(replay.layout, envs, rng))
        if replay.sequences:
            sample = replay.sample(4, rng)
            old = old or sample
            for names in (old, sample):
                replay.set_priority(names.slot, names.generation, rng.random(4))
    return replay


def assert_same(first: Any, second: Any) -> None:
    """Two trees of state, bit for bit."""
    (tensors, skeleton), (others, other) = flatten(first), flatten(second)
    assert skeleton == other
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def fields(replay: Replay, sample: Sample, *, observations: bool = True) -> dict[str, Any]:
    """A gathered batch, as `assert_same` takes it."""
    batch = replay.gather(sample, CPU, observations=observations)
    return batch._asdict() | {"finals": None if batch.finals is None else tuple(batch.finals)}


def filled(layout: ReplayLayout, **settings: Any) -> Replay:
    replay = made(layout, **settings)
    segment = segment_of(layout, list(range(layout.num_envs)))
    for _ in range(3 * layout.ring_rows // layout.segment_steps):
        replay.insert(segment)
    return replay


def draw_all(replay: Replay) -> Sample:
    """Every sequence once: there is one for each equal share while all priorities are equal."""
    return replay.sample(replay.sequences, np.random.default_rng(0))


def chi_square_p(counts: np.ndarray, expected: np.ndarray) -> float:
    statistic = float(((counts - expected) ** 2 / expected).sum())
    half = torch.tensor([(len(counts) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


@pytest.mark.parametrize("exponent", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("batch", [1, 64])
def test_sampling_frequencies_match_priorities(exponent: float, batch: int) -> None:
    replay = filled(layout_of(capacity=30), priority_exponent=exponent)
    every = draw_all(replay)
    assert len(set(every.slot.tolist())) == replay.sequences
    rng = np.random.default_rng(6)
    priority = rng.uniform(0.1, 5.0, len(every.slot))
    replay.set_priority(every.slot, every.generation, priority)
    draws = 12_800
    slots = [replay.sample(batch, rng).slot for _ in range(draws // batch)]
    counts = np.bincount(np.concatenate(slots), minlength=replay.layout.num_slots)[every.slot]
    share = priority**exponent
    assert counts.sum() == draws
    assert chi_square_p(counts, draws * share / share.sum()) > 1e-6
    other = priority ** (exponent + 0.4)
    assert chi_square_p(counts, draws * other / other.sum()) < 1e-6


def test_weights_undo_the_priorities() -> None:
    replay = filled(layout_of(), priority_exponent=1.0)
    every = draw_all(replay)
    priority = np.arange(1.0, len(every.slot) + 1)
    replay.set_priority(every.slot, every.generation, priority)
    known = dict(zip(every.slot.tolist(), priority, strict=True))
    sample = replay.sample(8, np.random.default_rng(1))
    chance = np.array([known[slot] for slot in sample.slot.tolist()]) / priority.sum()
    weight = (replay.sequences * chance) ** -0.6
    np.testing.assert_allclose(sample.weight, weight / weight.max(), rtol=1e-6)
    assert sample.weight.max() == 1.0
    assert torch.equal(replay.gather(sample, CPU).weight, torch.from_numpy(sample.weight))


@pytest.mark.parametrize("num_envs", [1, 3, 7])
@pytest.mark.parametrize("capacity", [1, 10, 29])
@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("cut", [(2, 4, 6), (4, 4, 5), (6, 2, 3)])
def test_there_is_room_for_the_capacity(
    num_envs: int, capacity: int, depth: int, cut: tuple[int, int, int]
) -> None:
    segment, stride, sequence = cut
    layout = layout_of(
        depth=depth,
        num_envs=num_envs,
        capacity=capacity,
        segment_steps=segment,
        stride_steps=stride,
        sequence_steps=sequence,
    )
    replay = filled(layout)
    for env in range(num_envs):  # at any point of the ring
        for _ in range(layout.ring_rows // segment):
            replay.insert(segment_of(layout, [env]))
            assert replay.sequences >= capacity


def test_a_step_of_atari_costs_little_more_than_its_frame() -> None:
    layout = layout_of(
        (84, 84),
        depth=4,
        num_envs=256,
        capacity=100_000,
        segment_steps=40,
        sequence_steps=120,
        stride_steps=80,
        recurrent=(torch.zeros(1, 512), torch.zeros(1, 512)),
        columns=("value", "action_value"),
    )
    raw = 84 * 84 + 2 * 512 * 4 / 80
    assert raw < layout.bytes_per_step < 1.01 * raw
    # Overlap is free: a sequence costs the 80 steps that are its own.
    assert layout.nbytes < 1.05 * 100_000 * 80 * raw


@pytest.mark.parametrize("depth", [1, 4])
def test_bytes_are_known_before_anything_is_allocated(depth: int, tmp_path: Path) -> None:
    state = (torch.zeros(1, 5), torch.zeros(1, 2, 3))
    layout = layout_of((3, 5), depth=depth, recurrent=state, columns=("value",))
    replay = made(layout)
    one_final = 15 + 4 + 8  # the table of final observations has one place at first
    assert replay.nbytes == layout.nbytes + one_final
    assert made(layout, folder=tmp_path).nbytes == replay.nbytes
    assert replay.bytes_per_step == replay.nbytes / layout.num_rows
    assert layout.frame_nbytes == (layout.num_rows + 1) * 15


@pytest.mark.parametrize("nbytes", [1_000, 5_000, 123_456])
def test_capacity_in_bytes(nbytes: int) -> None:
    layout = layout_of((9,), num_envs=2)
    capacity = layout.sequences_in(nbytes)
    larger = replace(layout, capacity=capacity + layout.num_envs)
    assert larger.nbytes > nbytes
    assert capacity == 0 or replace(layout, capacity=capacity).nbytes <= nbytes
    assert (capacity == 0) == (nbytes == 1_000)


def test_late_priorities_are_dropped_and_counted() -> None:
    layout = layout_of(num_envs=1, capacity=2)
    replay = filled(layout)
    old = draw_all(replay)
    for _ in range(layout.ring_rows // layout.segment_steps):
        replay.insert(segment_of(layout, [0]))
    # The same slots hold newer sequences now.
    new = draw_all(replay)
    assert set(old.slot.tolist()) & set(new.slot.tolist())
    many = np.full(len(old.slot), 1e9)
    assert replay.set_priority(old.slot, old.generation, many) == replay.late == len(old.slot)
    assert replay.sample(4, np.random.default_rng(0)).weight.tolist() == [1.0] * 4
    with pytest.raises(ValueError, match="written over"):
        replay.gather(old, CPU)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -1e-9])
def test_priorities_that_make_no_sense_are_errors(wrong: float) -> None:
    replay = filled(layout_of())
    every = draw_all(replay)
    priority = np.ones(len(every.slot))
    priority[-1] = wrong
    with pytest.raises(ValueError, match="finite"):
        replay.set_priority(every.slot, every.generation, priority)


def test_a_priority_of_zero_can_still_return() -> None:
    replay = filled(layout_of(num_envs=1, capacity=1))
    every = draw_all(replay)
    replay.set_priority(every.slot, every.generation, np.zeros(len(every.slot)))
    assert set(replay.sample(64, np.random.default_rng(0)).slot) == set(every.slot)


def test_new_sequences_have_the_largest_priority() -> None:
    layout = layout_of(num_envs=1, capacity=4)
    replay = filled(layout, priority_exponent=1.0)
    every = draw_all(replay)
    replay.set_priority(every.slot, every.generation, np.full(len(every.slot), 0.25))
    first, second = (replay.insert(segment_of(layout, [0])) for _ in range(2))
    new = int(np.concatenate([first.slot, second.slot])[0])
    sample = replay.sample(1000, np.random.default_rng(0))
    assert sample.weight.tolist() == [1.0] * 1000  # it is 0.25, as for all others
    replay.set_priority(every.slot[:1], every.generation[:1], np.array([8.0]))
    assert new in sample.slot


def test_a_batch_is_good_until_the_gather_after_next() -> None:
    layout = layout_of((8,))
    replay = filled(layout)
    first, second = (replay.gather(draw_all(replay), CPU).observation for _ in range(2))
    assert first.data_ptr() != second.data_ptr()


def test_counters() -> None:
    layout = layout_of()
    replay = made(layout)
    for _ in range(4):
        replay.insert(segment_of(layout, [0, 1]))
    assert (replay.inserted, replay.sequences) == (2, 2)
    replay.sample(5, np.random.default_rng(0))
    assert replay.sampled == 5


def test_sequences_that_were_drawn_are_counted_once_also_when_they_are_gone() -> None:
    layout, rng, drawn = layout_of(), np.random.default_rng(0), set()
    replay = made(layout)
    for _ in range(400):
        replay.insert(segment_of(layout, rng.integers(3, size=2).tolist()))
        if replay.sequences and rng.random() < 0.3:
            sample = replay.sample(3, rng)
            drawn |= set(zip(sample.slot.tolist(), sample.generation.tolist(), strict=True))
        assert replay.used == len(drawn)
    # Many are gone, and some went without ever having been drawn.
    assert replay.sequences < len(drawn) < replay.inserted
    names = replay.sample(5000, rng)
    gone = {name for name in drawn if not replay._rings.current(*np.array([name]).T).all()}
    assert replay.used == len(gone) + replay.sequences
    assert len(np.unique(names.slot)) == replay.sequences


def test_of_a_checkpoint_from_before_draws_were_noted_all_counts_as_drawn() -> None:
    replay, other = played(made(layout_of()), 4), made(layout_of())
    state = replay.state_dict()
    state["rings"] = {
        name: value
        for name, value in state["rings"].items()
        if name not in ("drawn", "drawn_before")
    }
    other.load_state_dict(state)
    assert other.used == other.inserted == replay.inserted
    rng = np.random.default_rng(0)
    for _ in range(20):
        other.insert(segment_of(other.layout, [0, 1, 2]))
    assert other.used == replay.inserted < other.inserted
    other.sample(1, rng)
    assert other.used - replay.inserted in (0, 1)


def test_a_run_starts_with_a_reset() -> None:
    layout = layout_of()
    segment = segment_of(layout, [0])
    segment.host["reset"][:] = False
    with pytest.raises(ValueError, match="reset"):
        made(layout).insert(segment)


def test_nothing_to_insert() -> None:
    replay = made(layout_of())
    assert len(replay.insert(segment_of(replay.layout, [])).slot) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segment_steps": 3}, "divide the other"),
        ({"segment_steps": 8, "recurrent": (torch.zeros(1, 2),)}, "must divide 4"),
        ({"stride_steps": 8}, "must fit"),
        ({"burn_in_steps": 6}, "must fit"),
        ({"capacity": 0}, "at least one"),
    ],
)
def test_cuts_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layout_of(**settings)


def test_a_resumed_replay_is_the_same_bit_for_bit() -> None:
    replay, other = played(made(layout_of(**RICH)), 4), made(layout_of(**RICH))
    assert replay.late
    tensors, skeleton = flatten(replay.state_dict())
    # As from a file: nothing that the writer does later may change what was read.
    other.load_state_dict(unflatten({name: t.clone() for name, t in tensors.items()}, skeleton))
    assert_same(replay.state_dict(), other.state_dict())
    for each in (replay, other):
        played(each, 5, inserts=20)
    assert_same(replay.state_dict(), other.state_dict())
    names = replay.sample(20, np.random.default_rng(9))
    assert_same(tuple(names), tuple(other.sample(20, np.random.default_rng(9))))
    assert fields(replay, names)["finals"] is not None
    assert_same(fields(replay, names), fields(other, names))


def test_a_mapped_file_holds_the_same(tmp_path: Path) -> None:
    plain = played(made(layout_of(**RICH)), 4)
    mapped = played(made(layout_of(**RICH), folder=tmp_path), 4)
    assert not list(tmp_path.iterdir())  # no name: nothing can be left behind
    assert_same(plain.state_dict(), mapped.state_dict())
    names = plain.sample(20, np.random.default_rng(9))
    assert_same(fields(plain, names), fields(mapped, names))


def test_frames_that_are_stacked_elsewhere_are_the_same() -> None:
    """The way to a GPU, single frames first, taken here from a CPU to itself."""
    replay = played(made(layout_of(**RICH)), 4)
    rng = np.random.default_rng(2)
    row = rng.integers(replay.layout.num_rows, size=(9, 5))
    reset = rng.random((9, 5)) < 0.3
    here = replay._reader.read(row, reset, CPU)
    there = replay._reader._read_staged(row, reset, CPU)
    assert here.observation.any()
    assert torch.equal(here.observation, there.observation)
    assert torch.equal(here.table[here.source], there.table[there.source])


def test_without_observations_all_else_is_the_same() -> None:
    replay = played(made(layout_of(**RICH)), 4)
    names = replay.sample(20, np.random.default_rng(9))
    full, bare = fields(replay, names), fields(replay, names, observations=False)
    assert bare["observation"].shape == (*full["reward"].shape, 0)
    assert bare["finals"] is None
    rest = {"observation": 0, "finals": 0}
    assert_same(full | rest, bare | rest)


def test_final_observations_go_with_their_rows() -> None:
    replay = made(layout_of(**RICH))
    played(replay, 4, inserts=300)
    # Every place that is taken belongs to one of the rows, so doubling ends.
    assert len(replay.state_dict()["rows"]["finals"]["value"]) <= 2 * replay.layout.num_rows
    assert replay.nbytes < 3 * replay.layout.nbytes


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="replay-folder"):
        made(layout_of(), folder=tmp_path / "missing")


def test_a_checkpoint_of_another_size_is_refused() -> None:
    state = made(layout_of(capacity=50)).state_dict()
    with pytest.raises(ConfigError, match="settings that wrote it"):
        made(layout_of()).load_state_dict(state)
