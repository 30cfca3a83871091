"""The block that worker processes share, as a table: a row for each environment.

    column              one row                   written by   read by
    observation         the space's shape         worker       server
    final_observation   the same                  worker       server, where an episode ended
    reward              float32                   worker       server
    reset, terminated,
      truncated         bool                      worker       server
    run_id              int64                     worker       server
    action_mask         bool [A], if there is one worker       server
    final_action_mask   the same                  worker       server, where an episode ended
    info_nbytes, info   JSON in uint8 [1024]      worker       server, where an episode ended
    action              the space's shape         server       worker

A row belongs to the worker from `reply` to its next record in the pipe, and else to the server, so
nothing in here is ever locked. The pipes are what orders the memory of the two.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.specs import EnvSpec
from headrace.steps import INFO_NBYTES, EnvStep, EpisodeInfo
from headrace.transport.messages import HostStep

ALIGNMENT = 64
"""Bytes: a cache line, so that no two columns share one."""
RECORD = struct.Struct("=HHI")
"""Worker, group, generation: what a worker writes into the common pipe, in one piece."""
GROUP = struct.Struct("=H")
"""What a worker is sent for each group whose actions are there."""


class Column(NamedTuple):
    """One column of the table."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]  # of one row
    offset: int  # bytes from the start of the block


class Layout(NamedTuple):
    """Where each column is."""

    num_envs: int
    columns: tuple[Column, ...]
    nbytes: int


class Rows(NamedTuple):
    """The same rows of every column, as views."""

    observation: NDArray[Any]
    final_observation: NDArray[Any]
    reward: NDArray[np.float32]
    reset: NDArray[np.bool_]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    run_id: NDArray[np.int64]
    info_nbytes: NDArray[np.int32]
    info: NDArray[np.uint8]
    action: NDArray[Any]
    action_mask: NDArray[np.bool_] | None = None
    final_action_mask: NDArray[np.bool_] | None = None


def layout(spec: EnvSpec, num_envs: int) -> Layout:
    """Returns the table of `num_envs` environments; parent and workers come to the same one."""
    observation = (spec.observation_space.dtype, spec.observation_space.shape)
    kinds: dict[str, tuple[Any, tuple[int, ...]]] = {
        "observation": observation,
        "final_observation": observation,
        "reward": (np.float32, ()),
        "reset": (np.bool_, ()),
        "terminated": (np.bool_, ()),
        "truncated": (np.bool_, ()),
        "run_id": (np.int64, ()),
        "info_nbytes": (np.int32, ()),
        "info": (np.uint8, (INFO_NBYTES,)),
        "action": (spec.action_dtype, spec.action_shape),
    }
    if spec.action_mask_size:
        mask = (np.bool_, (spec.action_mask_size,))
        kinds |= {"action_mask": mask, "final_action_mask": mask}
    columns, offset = [], 0
    for name, (kind, shape) in kinds.items():
        dtype = np.dtype(kind)
        columns.append(Column(name, dtype, shape, offset))
        nbytes = num_envs * math.prod(shape) * dtype.itemsize
        offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return Layout(num_envs, tuple(columns), max(offset, ALIGNMENT))


class Table:
    """The columns of a block as arrays; they keep the block alive."""

    def __init__(self, buffer: Any, layout: Layout) -> None:
        """Lays `layout` over `buffer`, a mapping of at least its bytes."""
        self.all = Rows(
            **{
                column.name: np.ndarray(
                    (layout.num_envs, *column.shape), column.dtype, buffer, column.offset
                )
                for column in layout.columns
            }
        )

    def rows(self, first: int, end: int) -> Rows:
        """Returns views of rows first .. end - 1."""
        return cut(self.all, first, end)


def cut(rows: Rows, first: int, end: int) -> Rows:
    """Returns views of rows first .. end - 1."""
    columns = rows._asdict()
    return Rows(
        **{name: column[first:end] for name, column in columns.items() if column is not None}
    )


def write_step(rows: Rows, step: EnvStep, *, run_offset: int) -> int:
    """Writes a group's step into its rows, all of them, in order.

    Args:
        rows: of the group.
        step: what its environments showed.
        run_offset: added to the run ids; of the worker's generation.

    Returns:
        How many infos were too long and were left out.
    """
    if not _write_columns(rows, step, run_offset):
        return 0
    if step.final_observation is not None:
        np.copyto(rows.final_observation, step.final_observation)
        if rows.final_action_mask is not None and step.final_action_mask is not None:
            np.copyto(rows.final_action_mask, step.final_action_mask)
    return write_infos(rows, step.episode_info or {})


def write_host_step(rows: Rows, step: HostStep, *, run_offset: int) -> None:
    """Writes a step into the rows of its block, all of them.

    Args:
        rows: Of the block.
        step: Of a host.
        run_offset: Added to the run ids; of the block's generation.
    """
    if not _write_columns(rows, step, run_offset):
        return
    if step.final_observation is not None:
        rows.final_observation[step.ended] = step.final_observation
        if rows.final_action_mask is not None and step.final_action_mask is not None:
            rows.final_action_mask[step.ended] = step.final_action_mask
    write_infos(rows, step.infos)


def _write_columns(rows: Rows, step: EnvStep | HostStep, run_offset: int) -> bool:
    """Writes what every row has of a step; returns whether any begins an episode."""
    np.copyto(rows.observation, step.observation)
    np.copyto(rows.reward, step.reward)
    np.copyto(rows.reset, step.reset)
    np.copyto(rows.terminated, step.terminated)
    np.copyto(rows.truncated, step.truncated)
    np.add(step.run_id, run_offset, out=rows.run_id)
    if rows.action_mask is not None and step.action_mask is not None:
        np.copyto(rows.action_mask, step.action_mask)
    return bool(np.count_nonzero(step.reset))


def write_infos(rows: Rows, infos: EpisodeInfo) -> int:
    """Writes the final infos of a step in which an episode ended.

    Returns:
        How many were too long and were left out.
    """
    rows.info_nbytes[:] = 0
    too_long = 0
    for row, scalars in infos.items():
        text = json.dumps(dict(scalars)).encode()
        if len(text) > INFO_NBYTES:
            too_long += 1
            continue
        rows.info[row, : len(text)] = np.frombuffer(text, np.uint8)
        rows.info_nbytes[row] = len(text)
    return too_long


def as_step(rows: Rows, env_id: NDArray[np.int32]) -> EnvStep:
    """Returns rows as a step, with room for final observations."""
    return EnvStep(
        env_id=env_id,
        run_id=rows.run_id,
        observation=rows.observation,
        reward=rows.reward,
        reset=rows.reset,
        terminated=rows.terminated,
        truncated=rows.truncated,
        final_observation=rows.final_observation,
        action_mask=rows.action_mask,
        final_action_mask=rows.final_action_mask,
    )


def read_step(table: Rows, where: slice | NDArray[np.int32], env_id: NDArray[np.int32]) -> EnvStep:
    """Returns rows of the whole table as a step: views for a slice, else copies.

    Args:
        table: all rows.
        where: rows that are wanted.
        env_id: the same, as numbers.
    """
    return with_ends(read_rows(table, where, env_id), table, where)


def read_rows(table: Rows, where: slice | NDArray[np.int32], env_id: NDArray[np.int32]) -> EnvStep:
    """Returns what every step has of `read_step`; views go on to show what is in the rows."""
    return EnvStep(
        env_id=env_id,
        run_id=table.run_id[where],
        observation=table.observation[where],
        reward=table.reward[where],
        reset=table.reset[where],
        terminated=table.terminated[where],
        truncated=table.truncated[where],
        final_observation=None,
        action_mask=None if table.action_mask is None else table.action_mask[where],
    )


def lend(
    table: Rows,
    spans: Sequence[tuple[int, int]],
    stretches: dict[tuple[int, int], EnvStep],
    spec: EnvSpec,
) -> tuple[slice | NDArray[np.int32], EnvStep]:
    """Returns which rows blocks have, less those that are absent, and these rows as a step.

    Args:
        table: all rows.
        spans: first row and the row behind the last of each block, in their order.
        stretches: views of rows that stand side by side, made once; filled here.
        spec: of the environments.
    """
    first, end = spans[0][0], spans[-1][1]
    if sum(end - first for first, end in spans) == end - first:
        where = slice(first, end)
        views = stretches.get((first, end))
        if views is None:
            views = read_rows(table, where, np.arange(first, end, dtype=np.int32))
            stretches[first, end] = views
        if spec.vector_envs is None or not views.absent.any():
            return where, with_ends(views, table, where)
    ids = np.concatenate([np.arange(*span, dtype=np.int32) for span in spans])
    if spec.vector_envs is not None:
        ids = ids[~(table.terminated[ids] & table.truncated[ids])]
    return ids, read_step(table, ids, ids)


def with_ends(step: EnvStep, table: Rows, where: slice | NDArray[np.int32]) -> EnvStep:
    """Returns a step with what the table has of the episodes that ended in it, if any did."""
    if not np.count_nonzero(step.reset):
        return step
    ended = step.reset & (step.terminated | step.truncated)
    if not ended.any():
        return step
    infos = {}
    for row in np.flatnonzero(ended):
        nbytes = int(table.info_nbytes[step.env_id[row]])
        if nbytes:
            infos[int(row)] = json.loads(table.info[step.env_id[row], :nbytes].tobytes())
    masks = table.final_action_mask
    return step._replace(
        final_observation=table.final_observation[where],
        final_action_mask=None if masks is None else masks[where],
        episode_info=infos or None,
    )
