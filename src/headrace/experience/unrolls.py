"""Stop 7: rows of one environment become an unroll of T + 1.

One table on the learner's device. A slot is U = T + 1 rows and, before them, the K - 1 frames that
the first row's stack needs:

    frames   slot 0: [p p p | 0 1 2 … T]   slot 1: …   one frame of zeros at the very end
    fields   slot 0:       [0 1 2 … T]     slot 1: …   action, log-probability, …

Each environment writes into its own slot. When row T is written, the slot is full and row T is
copied to be row 0 of the environment's next slot: unrolls overlap by one row. Where a batch takes
fewer unrolls than there are environments, these do not end their unrolls in the same step, or
server and learner would wait for each other in turn: environment i of N leaves out its first
i * T / N rows, and after a new start as many as bring it back to its phase. Frames are stored
once; `gather` rebuilds the stacks in the one copy that a batch costs, taking the frame of zeros for
what lies before an episode's start.

What arrives on the host (reward, flags, version) is kept there and crosses with the batch; what the
policy made never leaves the device.

Where a replay follows, full slots are only its mail: `segments` hands them over as they are, with
the final observations of truncated rows, which have a column of their own, and with what the policy
said of its actions. The table then lies where the replay does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.algorithms.base import ExperienceSpec
from headrace.experience.fifo import SlotQueue
from headrace.experience.segments import Segment
from headrace.experience.stacks import stack_index
from headrace.records import PolicyStep, Unrolls
from headrace.rows import upload, write_rows
from headrace.specs import EnvSpec
from headrace.steps import EnvStep

HOST_FIELDS = {
    "reward": np.float32,
    "terminated": np.bool_,
    "truncated": np.bool_,
    "version": np.int64,
}

Allocate = Callable[[str, tuple[int, ...], np.dtype[Any]], NDArray[Any]]
"""Name, shape and dtype of a column; returns zeros that may lie in memory shared by processes."""


def device_fields(
    spec: EnvSpec, *, for_replay: bool
) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape of one row and dtype of what the policy made, or needs again in the learner."""
    action = (spec.action_shape, np.dtype(spec.action_dtype))
    number: tuple[tuple[int, ...], np.dtype[Any]] = ((), np.dtype(np.float32))
    fields = {"action": action, "previous_action": action, "log_prob": number, "bootstrap": number}
    if for_replay:
        fields |= {"value": number, "action_value": number}
    if spec.has_action_mask:
        fields["action_mask"] = ((spec.action_mask_size,), np.dtype(np.bool_))
    return fields


class UnrollTable:
    """Unrolls under construction, and those that wait in `queue`. The server's thread writes."""

    def __init__(
        self,
        spec: EnvSpec,
        *,
        num_envs: int,
        experience: ExperienceSpec,
        num_slots: int,
        queue: SlotQueue,
        recurrent: tuple[Tensor, ...],
        device: torch.device,
        allocate: Allocate | None = None,
    ) -> None:
        """Allocates everything at once.

        Args:
            spec: Shapes of one environment.
            num_envs: Environments that write here.
            experience: T, and whether `segments` is asked for a replay, in place of `gather`.
            num_slots: Slots in all, those under construction included.
            queue: Where full slots go and free ones come from.
            recurrent: An example of the policy's recurrent state, each [1, ...].
            device: Where the learner reads; with a replay, where that lies.
            allocate: Makes the columns, on a CPU; None for memory of this process, on `device`.
        """
        self.first_env = 0
        """Number in the run of the environment that is 0 here."""
        self.generation = 0
        """How many wrote here before, for the same environments: their run ids are others."""
        self.spreads_ends = False
        """Whether the environments that write here end their unrolls in different steps."""
        self.queue = queue
        for_replay = experience.replay is not None
        self.rows = experience.unroll_steps + 1
        self.prefix = spec.frame_stack - 1
        self.dropped_unrolls = 0
        self.action_choices = spec.action_choices
        """See `EnvSpec`."""
        self._device = device
        self._allocate = allocate
        space = spec.observation_space
        frame_rows, rows = num_slots * (self.prefix + self.rows) + 1, num_slots * self.rows
        self._frames = self._tensor("frames", (frame_rows, *space.shape), np.dtype(space.dtype))
        self._zero_frame = frame_rows - 1
        self._fields = {
            name: self._tensor(name, (rows, *shape), dtype)
            for name, (shape, dtype) in device_fields(spec, for_replay=for_replay).items()
        }
        self._finals: Tensor | None = None
        if for_replay:  # few rows are ever written: in main memory, few are ever there
            self._finals = self._tensor("finals", (rows, *space.shape), np.dtype(space.dtype))
        self._final_masks: Tensor | None = None
        if for_replay and spec.has_action_mask:
            masks = (rows, spec.action_mask_size)
            self._final_masks = self._tensor("final_masks", masks, np.dtype(np.bool_))
        self.of_slot = {
            name: self._array(name, (num_slots,), np.dtype(np.int64))
            for name in ("env_id", "run_id")
        }
        """Whose steps lie in each slot."""
        self._host = {
            name: self._array(name, (rows,), np.dtype(dtype)) for name, dtype in HOST_FIELDS.items()
        }
        # Covers the prefix too: a stack must not reach behind a reset that lies before row 0.
        reset_shape = (num_slots, self.prefix + self.rows)
        self._reset = self._array("reset", reset_shape, np.dtype(np.bool_))
        self._recurrent = tuple(
            self._tensor(f"recurrent/{i}", (num_slots, *part.shape[1:]), part.cpu().numpy().dtype)
            for i, part in enumerate(recurrent)
        )
        self._slot = np.asarray(queue.acquire(num_envs), np.int64)
        # The next one; below 0 for rows that are left out, which only fill the prefix of row 0.
        self._row = np.zeros(num_envs, np.int64)
        self._run_id = np.full(num_envs, -1, np.int64)
        # On a GPU writer and reader have a stream each; the later one waits there, not here.
        self._written: dict[int, torch.cuda.Event] = {}
        self._read: dict[int, torch.cuda.Event] = {}

    def append(
        self,
        step: EnvStep,
        frames: Tensor,
        done: PolicyStep,
        *,
        previous_action: Tensor,
        recurrent: tuple[Tensor, ...],
        version: int,
        bootstrap: Tensor | None,
        action_mask: Tensor | None = None,
    ) -> None:
        """Writes one row for each environment of `step` and hands over the slots that are full.

        Args:
            step: What arrived.
            frames: [N, ...] its observations, on the policy's device.
            done: What the policy did.
            previous_action: [N, ...] what the policy was told.
            recurrent: Each [N, ...] state that was fed to this step.
            version: Update that made the weights.
            bootstrap: [N] values of final observations, valid where truncated; None if nothing was.
            action_mask: [N, A] what the policy was allowed, where the environment says so.
        """
        env = step.env_id
        fresh = self._run_id[env] != step.run_id
        if fresh.any():
            self.dropped_unrolls += int((self._row[env[fresh]] > 0).sum())
            self._run_id[env[fresh]] = -1
            self._row[env[fresh]] = self._first_rows(env[fresh])
            self._run_id[env[fresh]] = step.run_id[fresh]
        slot, true_row = self._slot[env], self._row[env]
        frame_row, row = np.maximum(true_row, -self.prefix), np.maximum(true_row, 0)
        self._reset[slot, self.prefix + frame_row] = step.reset
        self.of_slot["env_id"][slot] = self.first_env + env
        self.of_slot["run_id"][slot] = (self.generation << 32) + step.run_id
        self._write_host(slot * self.rows + row, step, version)
        at = self._upload(slot * self.rows + row)
        if frames.device != self._device:  # the host still has them
            frames = self._upload(step.observation)
        write_rows(self._frames, self._upload(self._frame_row(slot, frame_row)), frames)
        given = {
            "action": done.action,
            "log_prob": done.log_prob,
            "previous_action": previous_action,
            "bootstrap": bootstrap,
            "action_mask": action_mask,
        }
        if self._finals is not None:
            given |= {"value": done.value, "action_value": done.action_value}
            self._write_finals(slot * self.rows + row, step)
        for name, values in given.items():
            if values is not None:
                write_rows(self._fields[name], at, values.to(self._device))
        starts = np.flatnonzero(true_row == 0)
        self._store_recurrent(slot[starts], starts, recurrent)
        self._row[env] = true_row + 1
        full = np.flatnonzero(true_row == self.rows - 1)
        if full.size:
            self._hand_over(env[full], full, recurrent)

    def gather(self, slots: list[int]) -> Unrolls:
        """Copies the unrolls in `slots` into a batch, time first, stacks rebuilt."""
        _wait(self._written, slots)
        slot = np.asarray(slots, np.int64)
        rows = np.arange(self.rows)[:, None]
        flat = slot * self.rows + rows  # [U, B]
        at = self._upload(flat)
        shape = flat.shape
        stack = self._frames.index_select(0, self._upload(self._stack_rows(slot).reshape(-1)))
        device = {name: _rows(field, at) for name, field in self._fields.items()}
        host = {name: self._upload(field[flat]) for name, field in self._host.items()}
        slot_index = self._upload(slot)
        unrolls = Unrolls(
            observation=stack.view(*shape, self.prefix + 1, *stack.shape[1:]),
            reset=self._upload(self._reset[slot, self.prefix + rows]),
            reward=host["reward"],
            terminated=host["terminated"],
            truncated=host["truncated"],
            bootstrap=device["bootstrap"],
            previous_action=device["previous_action"],
            action=device["action"],
            log_prob=device["log_prob"],
            version=host["version"],
            recurrent=tuple(part.index_select(0, slot_index) for part in self._recurrent),
            action_mask=device.get("action_mask"),
        )
        self._mark(self._read, slots)
        return unrolls

    def segments(self, slots: list[int]) -> Segment:
        """Copies what is in `slots` for a replay; final observations of rows 1 to T with it."""
        if self._finals is None:
            raise RuntimeError("this table keeps no final observations: it is not for a replay")
        _wait(self._written, slots)
        slot = np.asarray(slots, np.int64)
        rows = np.arange(self.rows)
        flat = slot[:, None] * self.rows + rows  # [n, U]
        frame_rows = self._frame_row(slot[:, None], rows)
        host = {name: field[flat] for name, field in self._host.items()}
        host["reset"] = self._reset[slot, self.prefix :]
        truncated = host["truncated"].copy()
        truncated[:, 0] = False
        final_at = np.argwhere(truncated).astype(np.int64)
        final_rows = self._upload(flat[truncated])
        segment = Segment(
            env_id=self.of_slot["env_id"][slot],
            run_id=self.of_slot["run_id"][slot],
            frames=_rows(self._frames, self._upload(frame_rows)),
            columns={
                name: _rows(field, self._upload(flat))
                for name, field in self._fields.items()
                if name not in ("previous_action", "bootstrap")
            },
            host=host,
            recurrent=tuple(_rows(part, self._upload(slot)) for part in self._recurrent),
            final_frames=_rows(self._finals, final_rows),
            final_at=final_at,
            final_value=_rows(self._fields["bootstrap"], final_rows),
            final_mask=None if self._final_masks is None else _rows(self._final_masks, final_rows),
        )
        self._mark(self._read, slots)
        return segment

    def _first_rows(self, env: NDArray[np.int32]) -> NDArray[np.int64] | int:
        """Where environments begin that have just started: at 0, or below if ends are spread.

        The others say where all are in their common round of T steps: most of them, since those
        who were started at another time, or step more slowly, may be elsewhere.
        """
        if not self.spreads_ends:
            return 0
        steps = self.rows - 1
        phase = np.arange(len(self._row)) * steps // len(self._row)
        running = self._run_id >= 0
        clock = np.bincount((self._row + phase)[running] % steps, minlength=1).argmax()
        return -((phase[env] - clock) % steps)

    def unfinished(self) -> int:
        """Number of unrolls under construction that have rows: what a run that stops here loses."""
        return int((self._row > 0).sum())

    def state_dict(self) -> dict[str, Any]:
        """Returns everything, for a bit-equal resume."""
        return {
            "frames": self._frames,
            "fields": self._fields,
            "host": self._host,
            "reset": self._reset,
            "recurrent": list(self._recurrent),
            "finals": self._finals,
            "final_masks": self._final_masks,
            "of_slot": self.of_slot,
            "slot": self._slot,
            "row": self._row,
            "run_id": self._run_id,
            "queue": self.queue.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self._frames.copy_(state["frames"])
        for name, field in self._fields.items():
            field.copy_(state["fields"][name])
        for name, values in self._host.items():
            values[:] = state["host"][name]
        for part, stored in zip(self._recurrent, state["recurrent"], strict=True):
            part.copy_(stored)
        if self._finals is not None:
            self._finals.copy_(state["finals"])
        if self._final_masks is not None:
            masks = state.get("final_masks")  # a checkpoint from before there were any
            self._final_masks.copy_(torch.ones_like(self._final_masks) if masks is None else masks)
        for name, values in self.of_slot.items():
            values[:] = state["of_slot"][name]
        self._reset[:] = state["reset"]
        self._slot[:], self._row[:], self._run_id[:] = state["slot"], state["row"], state["run_id"]
        self.queue.restore(state["queue"])

    def views(self, slot: int) -> dict[str, NDArray[Any]]:
        """Returns what a slot holds, by column, in main memory; `of_slot` apart."""
        at = slice(slot * self.rows, (slot + 1) * self.rows)
        first_frame = slot * (self.prefix + self.rows)
        columns = {"frames": self._frames[first_frame : first_frame + self.prefix + self.rows]}
        columns |= {name: field[at] for name, field in self._fields.items()}
        columns |= {f"recurrent/{i}": part[slot] for i, part in enumerate(self._recurrent)}
        if self._finals is not None:
            columns["finals"] = self._finals[at]
        if self._final_masks is not None:
            columns["final_masks"] = self._final_masks[at]
        host = {name: values[at] for name, values in self._host.items()}
        host["reset"] = self._reset[slot]
        return {name: column.numpy() for name, column in columns.items()} | host

    def oldest_version(self, slot: int) -> int:
        """Version of the weights that acted first in a slot that is full."""
        return int(self._host["version"][slot * self.rows])

    def _array(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        return self._allocate(name, shape, dtype) if self._allocate else np.zeros(shape, dtype)

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
        if self._allocate or self._device.type == "cpu":
            # numpy's zeros are no memory until they are written.
            return torch.from_numpy(self._array(name, shape, dtype))
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        return torch.zeros(shape, dtype=kind, device=self._device)

    def _write_host(self, at: NDArray[np.int64], step: EnvStep, version: int) -> None:
        self._host["reward"][at] = step.reward
        self._host["terminated"][at] = step.terminated
        self._host["truncated"][at] = step.truncated
        self._host["version"][at] = version

    def _write_finals(self, at: NDArray[np.int64], step: EnvStep) -> None:
        if self._finals is not None and step.final_observation is not None:
            which = np.flatnonzero(step.truncated)
            final = np.ascontiguousarray(step.final_observation[which])
            into = self._upload(at[which])
            write_rows(self._finals, into, self._upload(final))
            if self._final_masks is not None and step.final_action_mask is not None:
                masks = np.ascontiguousarray(step.final_action_mask[which])
                write_rows(self._final_masks, into, self._upload(masks))

    def _store_recurrent(
        self, slot: NDArray[np.int64], which: NDArray[np.intp], recurrent: tuple[Tensor, ...]
    ) -> None:
        if len(slot) and recurrent:
            into, source = self._upload(slot), self._upload(which)
            for part, state in zip(self._recurrent, recurrent, strict=True):
                rows = state.index_select(0, source.to(state.device))
                write_rows(part, into, rows.to(part.device))

    def _hand_over(
        self, env: NDArray[np.int32], which: NDArray[np.intp], recurrent: tuple[Tensor, ...]
    ) -> None:
        """Row T of each full slot becomes row 0 of a free one; then the full slots change owner."""
        old, last = self._slot[env], self.rows - 1
        free = self.queue.acquire(len(old))
        _wait(self._read, free)
        new = np.asarray(free, np.int64)
        behind = np.arange(-self.prefix, 1)
        source = self._upload((self._frame_row(old, last)[:, None] + behind).reshape(-1))
        target = self._upload((self._frame_row(new, 0)[:, None] + behind).reshape(-1))
        write_rows(self._frames, target, self._frames.index_select(0, source))
        self._reset[new, : self.prefix + 1] = self._reset[old, last:]
        from_rows, to_rows = old * self.rows + last, new * self.rows
        for values in self._host.values():
            values[to_rows] = values[from_rows]
        from_row, to_row = self._upload(from_rows), self._upload(to_rows)
        for field in self._fields.values():
            write_rows(field, to_row, field.index_select(0, from_row))
        self._store_recurrent(new, which, recurrent)
        self._slot[env], self._row[env] = new, 1
        self._mark(self._written, old.tolist())
        self.queue.put(old.tolist())

    def _frame_row(
        self, slot: NDArray[np.int64], row: NDArray[np.int64] | int
    ) -> NDArray[np.int64]:
        return slot * (self.prefix + self.rows) + self.prefix + row

    def _stack_rows(self, slot: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of `_frames` [U, B, K] that make the stacks, oldest first."""
        row = self._frame_row(slot, 0) + np.arange(-self.prefix, self.rows)[:, None]
        return stack_index(
            row, self._reset[slot].T, depth=self.prefix + 1, zero_row=self._zero_frame
        )

    def _mark(self, events: dict[int, torch.cuda.Event], slots: list[int]) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            events.update(dict.fromkeys(slots, event))

    def _upload(self, array: NDArray[Any]) -> Tensor:
        return upload(array, self._device)


def _rows(table: Tensor, at: Tensor) -> Tensor:
    """Copies rows of a table: [*at.shape, ...]."""
    return table.index_select(0, at.reshape(-1)).view(*at.shape, *table.shape[1:])


def _wait(events: dict[int, torch.cuda.Event], slots: list[int]) -> None:
    """Lets this thread's stream wait until the other has done with `slots`."""
    for event in {events.pop(slot) for slot in slots if slot in events}:
        event.wait()
