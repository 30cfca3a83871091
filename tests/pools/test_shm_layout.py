"""The shared table: columns apart and aligned, and one mapping reads what another wrote."""

import mmap
import os
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.pools.memory import anonymous_block
from headrace.pools.shm_layout import (
    ALIGNMENT,
    Rows,
    Table,
    layout,
    read_step,
    write_step,
)
from headrace.specs import EnvSpec
from headrace.steps import INFO_NBYTES, EnvStep

DTYPES = [np.uint8, np.int16, np.int64, np.float32, np.bool_]


@st.composite
def specs(draw: st.DrawFn) -> EnvSpec:
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=3)))
    action_space: Any = draw(
        st.sampled_from(
            [
                gym.spaces.Discrete(3),
                gym.spaces.MultiDiscrete([2, 4, 3]),
                gym.spaces.Box(-1.0, 1.0, (3,), np.float32),
            ]
        )
    )
    return EnvSpec(
        name="x",
        observation_space=gym.spaces.Box(0, 1, shape, dtype),
        action_space=action_space,
        has_action_mask=not isinstance(action_space, gym.spaces.Box) and draw(st.booleans()),
    )


@given(spec=specs(), num_envs=st.integers(1, 40))
@settings(deadline=None)
def test_columns_are_aligned_and_never_overlap(spec: EnvSpec, num_envs: int) -> None:
    plan = layout(spec, num_envs)
    end = 0
    for column in sorted(plan.columns, key=lambda column: column.offset):
        assert column.offset % ALIGNMENT == 0
        assert column.offset >= end
        rows = np.empty((num_envs, *column.shape), column.dtype)
        end = column.offset + rows.nbytes
    assert end <= plan.nbytes


@given(spec=specs(), num_envs=st.integers(1, 20), data=st.data())
@settings(deadline=None, max_examples=40)
def test_a_second_mapping_reads_what_the_first_wrote(
    spec: EnvSpec, num_envs: int, data: st.DataObject
) -> None:
    plan = layout(spec, num_envs)
    fd, memory = anonymous_block(plan.nbytes)
    ours = Table(memory, plan)
    theirs = Table(mmap.mmap(fd, plan.nbytes), plan)
    os.close(fd)
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    written = {}
    for name, column in ours.all._asdict().items():
        if column is not None:
            values = rng.integers(0, 2, column.shape).astype(column.dtype)
            for row in range(num_envs):  # one by one: a row that lay over another would spoil it
                column[row] = values[row]
            written[name] = values
    assert ("action_mask" in written) == spec.has_action_mask
    for name, values in written.items():
        np.testing.assert_array_equal(getattr(theirs.all, name), values, err_msg=name)


SPEC = EnvSpec(
    name="x",
    observation_space=gym.spaces.Box(0, 9, (2,), np.float32),
    action_space=gym.spaces.Discrete(3),
)


def some_step(ended: list[bool], infos: dict[int, dict[str, float]] | None = None) -> EnvStep:
    flags = np.array(ended)
    shown = np.arange(2.0 * len(ended), dtype=np.float32).reshape(-1, 2)
    return EnvStep(
        env_id=np.arange(len(ended), dtype=np.int32),
        run_id=np.zeros(len(ended), dtype=np.int64),
        observation=shown,
        reward=shown[:, 0],
        reset=flags,
        terminated=flags,
        truncated=np.zeros_like(flags),
        final_observation=shown + 1 if flags.any() else None,
        episode_info=infos,
    )


def table(num_envs: int) -> Table:
    plan = layout(SPEC, num_envs)
    return Table(bytearray(plan.nbytes), plan)


def written(step: EnvStep) -> EnvStep:
    rows = table(len(step.env_id)).all
    assert write_step(rows, step, run_offset=0) == 0
    return read_step(rows, slice(0, len(step.env_id)), step.env_id)


def test_a_step_is_read_as_it_was_written() -> None:
    step = some_step([False, True, True], {1: {"speed": 1.5, "wins": float("inf")}})
    read = written(step)
    for name, value in step._asdict().items():
        np.testing.assert_array_equal(getattr(read, name), value, err_msg=name)


def test_without_an_end_there_is_no_final_observation() -> None:
    read = written(some_step([False, False]))
    assert read.final_observation is None
    assert read.episode_info is None


def test_an_info_is_read_once() -> None:
    rows = table(2).all
    write_step(rows, some_step([True, True], {0: {"a": 1.0}}), run_offset=0)
    write_step(rows, some_step([True, True], {1: {"a": 2.0}}), run_offset=0)
    ids = np.array([0, 1], dtype=np.int32)
    assert read_step(rows, ids, ids).episode_info == {1: {"a": 2.0}}


def test_an_info_that_is_too_long_is_left_out_and_counted() -> None:
    rows = table(2).all
    infos = {0: {"x" * INFO_NBYTES: 1.0}, 1: {"b": 1.0}}
    assert write_step(rows, some_step([True, True], infos), run_offset=0) == 1
    assert read_step(rows, slice(0, 2), np.array([0, 1], np.int32)).episode_info == {1: {"b": 1.0}}


def test_rows_of_a_group_are_their_own() -> None:
    whole = table(6)
    group = whole.rows(2, 4)
    write_step(group, some_step([True, False]), run_offset=7)
    assert whole.all.run_id.tolist() == [0, 0, 7, 7, 0, 0]
    assert whole.all.reset.tolist() == [False, False, True, False, False, False]
    ids = np.array([1, 2, 5], dtype=np.int32)
    step = read_step(whole.all, ids, ids)
    assert step.reset.tolist() == [False, True, False]
    assert step.observation[1].tolist() == [0.0, 1.0]


def test_observations_of_another_dtype_or_shape_are_refused() -> None:
    rows: Rows = table(2).all
    step = some_step([False, False])
    with pytest.raises(TypeError, match="cast"):
        write_step(rows, step._replace(reset=np.zeros(2)), run_offset=0)
    with pytest.raises(ValueError, match="broadcast"):
        write_step(rows, step._replace(observation=np.zeros((2, 3), np.float32)), run_offset=0)
