"""Stop 7 beside environments in torch: all of them step together, so their unrolls fill together.

One tape on the device, time first. A block is T + 1 rows of all N environments, so N unrolls; the
last row of one is the first of the next, and lies there once:

    tape    block 0: [0 1 … T]
                     block 1: [T … 2T]   …   block n - 1: [… nT]      row nT is copied to row 0
    slot    block * N + environment

A step writes one row, a batch for the learner is a few slices, and nothing is kept on the host but
the version of each row. Slots come and go in a ring: who reads them gives them back in their order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.algorithms.base import ExperienceSpec
from headrace.experience.fifo import SlotQueue
from headrace.experience.segments import Segment
from headrace.experience.unrolls import device_fields
from headrace.records import PolicyState, Unrolls
from headrace.rows import upload, write_rows
from headrace.specs import EnvSpec

_FLAGS = ("reset", "terminated", "truncated")
_MADE = ("reward", *_FLAGS)  # by the environments


class DeviceUnrolls:
    """Unrolls under construction, and those that wait in `queue`. The server's thread writes."""

    def __init__(
        self,
        spec: EnvSpec,
        *,
        num_envs: int,
        experience: ExperienceSpec,
        blocks: int,
        recurrent: tuple[Tensor, ...],
        device: torch.device,
        queue: SlotQueue,
        reader: torch.device,
    ) -> None:
        """Allocates everything at once.

        Args:
            spec: Shapes of one environment.
            num_envs: N: environments that write here.
            experience: T, and whether `segments` is asked for a replay, in place of `gather`.
            blocks: Of N slots each, at least 2: one is filled, and the next one begins with it.
            recurrent: An example of the policy's recurrent state, each [1, ...].
            device: Of the environments and the policy.
            queue: Where full slots go and free ones come from: `blocks` x N of them.
            reader: Where batches go: the learner's device, or with a replay, the replay's.
        """
        self.queue = queue
        self.dropped_unrolls = 0
        self.steps = experience.unroll_steps
        self.num_envs = num_envs
        self.prefix = spec.frame_stack - 1
        self._device, self._reader = device, reader
        self._blocks = blocks
        space = spec.observation_space
        kinds = device_fields(spec, for_replay=experience.replay is not None)
        kinds["frames"] = (space.shape, np.dtype(space.dtype))
        kinds["reward"] = ((), np.dtype(np.float32))
        kinds |= {name: ((), np.dtype(np.bool_)) for name in _FLAGS}
        if experience.replay is not None:
            kinds["finals"] = kinds["frames"]
        self._last = blocks * self.steps  # the row that is row 0 too
        self._tape = {
            name: self._zeros((self._last + 1, num_envs, *shape), dtype)
            for name, (shape, dtype) in kinds.items()
        }
        self._version = np.zeros(self._last + 1, np.int64)
        # What was fed to row 0 of each block.
        self._recurrent = tuple(
            self._zeros((blocks, num_envs, *part.shape[1:]), part.cpu().numpy().dtype)
            for part in recurrent
        )
        frames = (blocks, num_envs, self.prefix, *space.shape)
        self._older_frames = self._zeros(frames, np.dtype(space.dtype))
        self._at = torch.zeros(1, dtype=torch.int64, device=device)  # the row that is written
        self._block, self._row = 0, 0
        self._written: dict[int, torch.cuda.Event] = {}  # as in `unrolls.UnrollTable`
        self._read: dict[int, torch.cuda.Event] = {}
        self._acquire(0)

    @property
    def keeps_finals(self) -> bool:
        """Whether final observations are kept, for a replay."""
        return "finals" in self._tape

    def begin_row(self) -> int | None:
        """Says where the next `write` goes, and takes slots if that row begins new unrolls.

        Returns:
            The block that it is the first row of, if it is: `begin_block` is then to follow.
        """
        self._at.fill_(self._block * self.steps + self._row)
        if self._row == self.steps:
            following = (self._block + 1) % self._blocks
            self._acquire(following)
            return following
        return self._block if self._row == 0 else None

    def begin_block(self, block: int, state: PolicyState) -> None:
        """Keeps the state of all environments that is fed to the first row of `block`."""
        for part, given in zip(self._recurrent, state.recurrent, strict=True):
            part[block].copy_(given)
        if self.prefix:
            self._older_frames[block].copy_(state.stack[:, 1:])

    def write(self, **fields: Tensor | None) -> None:
        """Writes [N, ...] of each field into the row of `begin_row`; what is None stays as it is.

        Always the same work at the same addresses, as a captured graph wants it.
        """
        for name, values in fields.items():
            if values is not None and name in self._tape:
                write_rows(self._tape[name], self._at, values.unsqueeze(0))

    def end_row(self, version: int) -> None:
        """Goes on to the next row; hands all slots of the block over if they are full now."""
        row = self._block * self.steps + self._row
        self._version[row] = version
        if self._row < self.steps:
            self._row += 1
            return
        if row == self._last:
            self._version[0] = version
            for field in self._tape.values():
                field[0].copy_(field[-1])
        full = self._block
        self._block, self._row = (full + 1) % self._blocks, 1
        self._mark(self._written, [full])
        self.queue.put(range(full * self.num_envs, (full + 1) * self.num_envs))

    def gather(self, slots: list[int]) -> Unrolls:
        """Copies the unrolls in `slots` into a batch, time first, stacks rebuilt."""
        runs = self._borrowed(slots)
        fields = {name: self._sent(self._rows(field, runs)) for name, field in self._tape.items()}
        older = self._sent(self._starts(self._older_frames, runs)).transpose(0, 1)
        unrolls = Unrolls(
            observation=stacked(fields["frames"], older, fields["reset"]),
            reset=fields["reset"],
            reward=fields["reward"],
            terminated=fields["terminated"],
            truncated=fields["truncated"],
            bootstrap=fields["bootstrap"],
            previous_action=fields["previous_action"],
            action=fields["action"],
            log_prob=fields["log_prob"],
            version=upload(self._versions(runs), self._reader),
            recurrent=tuple(self._sent(self._starts(part, runs)) for part in self._recurrent),
        )
        self._mark(self._read, [block for block, _ in runs])
        return unrolls

    def segments(self, slots: list[int]) -> Segment:
        """Copies what is in `slots` for a replay; final observations of rows 1 to T with it."""
        if not self.keeps_finals:
            raise RuntimeError("this tape keeps no final observations: it is not for a replay")
        runs = self._borrowed(slots)
        fields = {
            name: self._rows(field, runs).transpose(0, 1).contiguous()
            for name, field in self._tape.items()
        }
        # The one wait: rings and priorities of a replay are the host's.
        host = {name: fields[name].cpu().numpy() for name in _MADE}
        host["version"] = np.ascontiguousarray(self._versions(runs).T)
        truncated = host["truncated"].copy()
        truncated[:, 0] = False
        final = upload(np.flatnonzero(truncated), self._device)
        segment = Segment(
            env_id=np.asarray(slots, np.int64) % self.num_envs,
            run_id=np.zeros(len(slots), np.int64),
            frames=self._sent(fields["frames"]),
            columns={
                name: self._sent(field)
                for name, field in fields.items()
                if name not in ("frames", "finals", "previous_action", "bootstrap", *_MADE)
            },
            host=host,
            recurrent=tuple(self._sent(self._starts(part, runs)) for part in self._recurrent),
            final_frames=self._sent(fields["finals"].flatten(0, 1).index_select(0, final)),
            final_at=np.argwhere(truncated).astype(np.int64),
            final_value=self._sent(fields["bootstrap"].flatten().index_select(0, final)),
        )
        self._mark(self._read, [block for block, _ in runs])
        return segment

    def oldest_version(self, slot: int) -> int:
        """Version of the weights that acted first in a slot that is full."""
        return int(self._version[slot // self.num_envs * self.steps])

    def unfinished(self) -> int:
        """Number of unrolls under construction that have rows: what a run that stops here loses."""
        return self.num_envs if self._row else 0

    def state_dict(self) -> dict[str, Any]:
        """Returns everything, for a bit-equal resume."""
        return {
            "tape": self._tape,
            "version": self._version,
            "recurrent": list(self._recurrent),
            "older_frames": self._older_frames,
            "block": self._block,
            "row": self._row,
            "queue": self.queue.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        for name, field in self._tape.items():
            field.copy_(state["tape"][name])
        self._version[:] = state["version"]
        for part, stored in zip(self._recurrent, state["recurrent"], strict=True):
            part.copy_(stored)
        self._older_frames.copy_(state["older_frames"])
        self._block, self._row = state["block"], state["row"]
        self.queue.restore(state["queue"])

    def _zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
        if self._device.type == "cpu":
            # numpy's zeros are no memory until they are written.
            return torch.from_numpy(np.zeros(shape, dtype))
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        return torch.zeros(shape, dtype=kind, device=self._device)

    def _acquire(self, block: int) -> None:
        slots = self.queue.acquire(self.num_envs)
        if slots != list(range(block * self.num_envs, (block + 1) * self.num_envs)):
            raise RuntimeError("slots came back in another order than they were handed over in")
        if block in self._read:
            self._read.pop(block).wait(torch.cuda.current_stream(self._device))

    def _borrowed(self, slots: list[int]) -> list[tuple[int, slice]]:
        """Returns slots as runs of neighbours, each a block and its environments."""
        slot = np.asarray(slots, np.int64)
        begins = np.flatnonzero((np.diff(slot, prepend=-2) != 1) | (slot % self.num_envs == 0))
        runs = []
        for begin, end in zip(begins, [*begins[1:], len(slot)], strict=True):
            block, first = divmod(int(slot[begin]), self.num_envs)
            runs.append((block, slice(first, first + int(end - begin))))
        for event in [self._written[block] for block, _ in runs if block in self._written]:
            event.wait(torch.cuda.current_stream(self._device))
        return runs

    def _rows(self, field: Tensor, runs: list[tuple[int, slice]]) -> Tensor:
        """Copies rows [U, B, ...] of a field."""
        starts = [(block * self.steps, envs) for block, envs in runs]
        return torch.cat(
            [field[start : start + self.steps + 1, envs] for start, envs in starts], dim=1
        )

    def _starts(self, field: Tensor, runs: list[tuple[int, slice]]) -> Tensor:
        """Copies what was fed to row 0: [B, ...]."""
        return torch.cat([field[block, envs] for block, envs in runs])

    def _versions(self, runs: list[tuple[int, slice]]) -> NDArray[np.int64]:
        """Returns the version [U, B] of each row."""
        rows = np.arange(self.steps + 1)
        counts = [envs.stop - envs.start for _, envs in runs]
        blocks = np.repeat([block for block, _ in runs], counts)
        version: NDArray[np.int64] = self._version[rows[:, None] + blocks * self.steps]
        return version

    def _sent(self, field: Tensor) -> Tensor:
        return field.to(self._reader)

    def _mark(self, events: dict[int, torch.cuda.Event], blocks: list[int]) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            events.update(dict.fromkeys(blocks, event))


def stacked(frames: Tensor, older: Tensor, reset: Tensor) -> Tensor:
    """Rebuilds stacks [U, B, K, ...] from single frames; zeros for what is before an episode.

    Args:
        frames: [U, B, ...] single frames.
        older: [K - 1, B, ...] those before row 0, zeros where the episode had not begun.
        reset: [U, B] an episode begins with this frame.
    """
    rows, depth = len(frames), len(older) + 1
    whole = torch.cat([older, frames])
    resets = torch.cat([torch.zeros_like(reset[:1]).expand(depth - 1, -1), reset])
    columns, hidden = [frames], torch.zeros_like(reset)
    for back in range(1, depth):
        # What is older than the start of an episode belongs to the one before.
        hidden = hidden | resets[depth - back :][:rows]
        mask = hidden.view(*hidden.shape, *[1] * (frames.dim() - 2))
        columns.append(whole[depth - 1 - back :][:rows].masked_fill(mask, 0))
    return torch.stack(columns[::-1], dim=2)
