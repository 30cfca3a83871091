"""What a replay is made of, and how many bytes that takes, known before anything is allocated.

Every environment has a ring of R rows, and its rows are numbered from 0 for ever: row r lies at
r % R. Sequences start at the multiples of `stride_steps`, so that each start has a slot of its own:

    row    0        c        2c       3c   ...        segments, one row shared with the next
           |--------|--------|--------|
           0=============================U-1          sequence of slot 0: sequence_steps + 1 rows
                    stride=============================       slot 1
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from torch import Tensor

from headrace.errors import ConfigError
from headrace.experience.sum_tree import SumTree
from headrace.specs import EnvSpec

Field = tuple[tuple[int, ...], np.dtype[Any]]
"""Shape of one row and dtype of a column."""

HOST_FIELDS: dict[str, np.dtype[Any]] = {
    "reward": np.dtype(np.float32),
    "reset": np.dtype(np.bool_),
    "terminated": np.dtype(np.bool_),
    "truncated": np.dtype(np.bool_),
    "version": np.dtype(np.int32),
    "final": np.dtype(np.int32),
}
ENV_NBYTES = 3 * 8
"""Of the bookkeeping of one environment: last row, begin of the stream, run id."""
SLOT_NBYTES = 2 * 8 + 2
"""Of the bookkeeping of one slot: start, generation, alive, drawn."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReplayLayout:
    """Shapes of a replay; `Replay` allocates exactly this, and the final observations besides."""

    spec: EnvSpec
    num_envs: int
    capacity: int
    """Sequences there is always room for, over all environments; rounded up to as many for each."""
    segment_steps: int
    """c: steps in which experience arrives; this or stride_steps divides the other."""
    sequence_steps: int
    """Steps of a sampled sequence, burn-in included; it has one row more."""
    stride_steps: int
    """Steps from the start of one sequence to that of the next."""
    burn_in_steps: int = 0
    """Steps at the start of a sequence whose final observations nobody asks for."""
    recurrent: tuple[Tensor, ...] = ()
    """An example of the policy's recurrent state, each [1, ...]; () for none."""
    columns: tuple[str, ...] = ()
    """Which of "value" and "action_value" segments have and sequences need."""

    def __post_init__(self) -> None:
        c, stride = self.segment_steps, self.stride_steps
        if min(self.num_envs, self.capacity, c, stride) < 1:
            raise ConfigError("a replay needs at least one environment, sequence and step of each")
        if not stride <= self.sequence_steps or not 0 <= self.burn_in_steps < self.sequence_steps:
            raise ConfigError(
                f"stride_steps={stride} and burn_in_steps={self.burn_in_steps} must fit into "
                f"sequences of {self.sequence_steps} steps"
            )
        if c % stride and stride % c:
            raise ConfigError(
                f"one of unroll_steps={c} and the stride of sequences, {stride}, must divide the "
                "other"
            )
        if c > stride and self.recurrent:
            raise ConfigError(
                f"unrolls of {c} steps have no recurrent state for sequences that start every "
                f"{stride} steps: unroll_steps must divide {stride}"
            )

    @property
    def prefix(self) -> int:
        """Rows before a sequence that it needs: for its first stack and its previous action."""
        return max(self.spec.frame_stack - 1, 1)

    @property
    def alignment(self) -> int:
        """A new stream begins at a multiple of this, where a segment and a sequence start."""
        return max(self.segment_steps, self.stride_steps)

    @property
    def ring_rows(self) -> int:
        """R, a multiple of `alignment`."""
        per_env = -(-self.capacity // self.num_envs)
        # Whole sequences start within the last R - prefix - sequence_steps rows; what one segment
        # completes must all be among them.
        starts = max(per_env * self.stride_steps, self.segment_steps)
        rows = starts + self.sequence_steps + self.prefix
        return -(-rows // self.alignment) * self.alignment

    @property
    def slots_per_env(self) -> int:
        """Starts of sequences within one ring."""
        return self.ring_rows // self.stride_steps

    @property
    def num_rows(self) -> int:
        """Rows of all rings."""
        return self.num_envs * self.ring_rows

    @property
    def num_slots(self) -> int:
        """Slots of all rings."""
        return self.num_envs * self.slots_per_env

    @property
    def frame_field(self) -> Field:
        """One frame. The table has one frame more than there are rows: zeros, for hidden ones."""
        space = self.spec.observation_space
        return tuple(space.shape), np.dtype(space.dtype)

    @property
    def device_fields(self) -> dict[str, Field]:
        """Columns that lie with the frames."""
        number: Field = ((), np.dtype(np.float32))
        fields: dict[str, Field] = {
            "action": (self.spec.action_shape, _action_dtype(self.spec)),
            "log_prob": number,
        }
        fields |= dict.fromkeys(self.columns, number)
        if self.spec.has_action_mask:
            fields["action_mask"] = ((self.spec.action_mask_size,), np.dtype(np.bool_))
        return fields

    @property
    def recurrent_fields(self) -> list[Field]:
        """Recurrent state, once per slot."""
        return [(tuple(part.shape[1:]), part.cpu().numpy().dtype) for part in self.recurrent]

    @property
    def frame_nbytes(self) -> int:
        """Bytes of the frames: what lies in the file of a replay on disk."""
        return (self.num_rows + 1) * _nbytes(self.frame_field)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is allocated at the start, in whatever memory."""
        per_row = sum(map(_nbytes, self.device_fields.values()))
        per_row += sum(dtype.itemsize for dtype in HOST_FIELDS.values())
        per_slot = sum(map(_nbytes, self.recurrent_fields)) + SLOT_NBYTES
        bookkeeping = ENV_NBYTES * self.num_envs + SumTree.required_nbytes(self.num_slots)
        rows, slots = self.num_rows * per_row, self.num_slots * per_slot
        return self.frame_nbytes + rows + slots + bookkeeping

    @property
    def bytes_per_step(self) -> float:
        """`nbytes` per row."""
        return self.nbytes / self.num_rows

    def sequences_in(self, nbytes: int) -> int:
        """Largest capacity that takes at most `nbytes`; 0 if one for each environment does not."""

        def taken(per_env: int) -> int:
            return replace(self, capacity=per_env * self.num_envs).nbytes

        too_many = 1
        while taken(too_many) <= nbytes:
            too_many *= 2
        return self.num_envs * bisect_right(range(1, too_many), nbytes, key=taken)


def _nbytes(field: Field) -> int:
    shape, dtype = field
    return prod(shape) * dtype.itemsize


def _action_dtype(spec: EnvSpec) -> np.dtype[Any]:
    """The smallest that holds every choice; float32 where actions are continuous."""
    if not spec.action_choices:
        return np.dtype(np.float32)
    largest = max(spec.action_choices) - 1
    return np.dtype(next(t for t in (np.uint8, np.int16, np.int32) if largest <= np.iinfo(t).max))
