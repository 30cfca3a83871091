"""Recurrent replay with priorities: sequences of one environment each, stored once.

Rows lie in one ring per environment (`replay_layout`), and sequences that overlap share them, so a
step costs one frame and few bytes more, whatever burn-in and frame stack are. A sequence is whole
when its last row has come, and dies before any row that it needs is written over; its slot then
counts a generation more, by which a priority that comes late is known and dropped.

Priorities and importance weights are those of Schaul et al. 2016, "Prioritized Experience Replay",
sections 3.3 and 3.4, over whole sequences (Kapturowski et al. 2019, R2D2, section 2.3).

One thread: inserts, samples and updates of priorities take turns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.experience.replay_frames import FrameReader, Stacks
from headrace.experience.replay_layout import ReplayLayout
from headrace.experience.replay_rings import Rings
from headrace.experience.replay_rows import NO_FINAL, ReplayRows, moved
from headrace.experience.segments import Segment
from headrace.experience.sum_tree import SumTree
from headrace.ops.priorities import importance_weights
from headrace.records import Finals, Unrolls
from headrace.rows import upload

LEAST_PRIORITY = 1e-6
"""What 0 is raised to: a sequence that was learned perfectly once can still return."""


class Sample(NamedTuple):
    """Sequences of a replay, by name. A slot is used again; slot and generation are not."""

    slot: NDArray[np.int64]  # [B]
    generation: NDArray[np.int64]  # [B]
    weight: NDArray[np.float32]  # [B] importance, in (0, 1]; 1 if they were not drawn


class Replay:
    """Keeps the newest sequences of every environment and draws from them by priority."""

    def __init__(
        self,
        layout: ReplayLayout,
        *,
        device: torch.device,
        priority_exponent: float,
        importance_exponent: float,
        folder: Path | None = None,
    ) -> None:
        """Allocates everything at once, `layout.nbytes` in all.

        Args:
            layout: Shapes.
            device: Where frames, columns and recurrent states lie; flags and bookkeeping are here.
            priority_exponent: Sequences are drawn in proportion to priority ** this; 0: all alike.
            importance_exponent: How far weights undo that: 0 not at all, 1 wholly.
            folder: Where the frames lie in a file without a name, on the CPU's side whatever
                `device`; None for memory.

        Raises:
            ConfigError: the file does not fit into `folder`.
        """
        self.layout = layout
        self._rings = Rings(layout)
        self._rows = ReplayRows(layout, device, folder)
        self._reader = FrameReader(self._rows.frames, layout.spec.frame_stack)
        self._tree = SumTree(layout.num_slots)
        self._priority_exponent = priority_exponent
        self.importance_exponent = importance_exponent
        """As the parameter; it may change from one sample to the next."""
        self._largest = 0.0  # priority so far; 0 before the first
        self.scales_weights = True
        """Whether importance weights are over the largest of a sample; else that is left to whoever
        learns from several replays at once."""
        self.inserted = 0
        """Sequences that became whole."""
        self.sampled = 0
        """Sequences that were drawn."""
        self.late = 0
        """Priorities that came too late, for sequences that were gone."""

    @property
    def sequences(self) -> int:
        """Sequences that may be drawn now."""
        return self._rings.sequences

    @property
    def used(self) -> int:
        """Sequences that were drawn at least once, of all that became whole."""
        return self._rings.drawn

    @property
    def nbytes(self) -> int:
        """Bytes of everything but the buffers of `gather`."""
        return self._rows.nbytes + self._rings.nbytes + self._tree.nbytes

    @property
    def bytes_per_step(self) -> float:
        """Bytes per row that there is room for."""
        return self.nbytes / self.layout.num_rows

    def insert(self, segment: Segment) -> Sample:
        """Takes segments [n], those of one environment in order; returns what became whole.

        New sequences have the largest priority there ever was, until `set_priority`.

        Raises:
            ValueError: the stream of a new run does not start with a reset.
        """
        turn = _turns(segment.env_id)
        turns = range(int(turn.max(initial=-1)) + 1)
        if len(turns) == 1:
            born = [self._insert(segment)]
        else:
            born = [self._insert(_only(segment, np.flatnonzero(turn == now))) for now in turns]
        slot = np.concatenate([np.empty(0, np.int64), *(new.slot for new in born)])
        generation = np.concatenate([np.empty(0, np.int64), *(new.generation for new in born)])
        # Many segments of one environment may write over what the first of them made whole.
        kept = self._rings.current(slot, generation)
        return _undrawn(slot[kept], generation[kept])

    def _insert(self, segment: Segment) -> Sample:
        """Takes segments of different environments."""
        env = segment.env_id
        start, fresh, born, died = self._rings.advance(env, segment.run_id)
        if not segment.host["reset"][fresh, 0].all():
            raise ValueError("the first row of a new run must be a reset")
        self._tree.set(died, 0.0)
        self._rows.write(self._rings.segment_rows(env, start), fresh, segment)
        if segment.recurrent:
            which = np.flatnonzero(start % self.layout.stride_steps == 0)
            slot = self._rings.slot(env[which], start[which])
            self._rows.write_recurrent(slot, which, segment)
        self._tree.set(born, (self._largest or 1.0) ** self._priority_exponent)
        self.inserted += len(born)
        return _undrawn(born, self._rings.generation(born))

    def sample(self, count: int, generator: np.random.Generator) -> Sample:
        """Draws `count` sequences in proportion to their priorities, one from each equal share.

        Raises:
            ValueError: there are none.
        """
        if not self.sequences:
            raise ValueError("an empty replay has nothing to sample")
        slot = self._tree.sample((np.arange(count) + generator.random(count)) / count)
        chance = self._tree.get(slot) / self._tree.total
        chance_B = torch.from_numpy(chance)
        weight = chance_B**-self.importance_exponent
        if self.scales_weights:
            weight = importance_weights(chance_B, self.sequences, self.importance_exponent)
        self.sampled += count
        self._rings.draw(slot)
        return Sample(slot, self._rings.generation(slot), weight.float().numpy())

    def gather(self, sample: Sample, device: torch.device, *, observations: bool = True) -> Unrolls:
        """Copies sequences into a batch on `device`, time first, stacks rebuilt.

        On a CPU the observations are good until the gather after next: see `FrameReader`.

        Args:
            sample: Which.
            device: Where the batch shall be.
            observations: False for a batch whose `observation` is [U, B, 0], without `finals`.

        Raises:
            ValueError: one of them is gone.
        """
        if not self._rings.current(sample.slot, sample.generation).all():
            raise ValueError("a sequence was written over before it was gathered")
        return self._gather(sample, device, observations=observations)

    def example(self, count: int, device: torch.device) -> Unrolls:
        """Returns a batch of the right shapes, from whatever lies in the first slot."""
        first = np.zeros(count, np.int64)
        return self._gather(_undrawn(first, first), device, observations=True)

    def _gather(self, sample: Sample, device: torch.device, *, observations: bool) -> Unrolls:
        device = torch.empty(0, device=device).device  # "cuda" is a name of "cuda:0"
        rows, prefix = self._rows, self.layout.prefix
        around = self._rings.sequence_rows(sample.slot)
        at = around[prefix:]  # [U, B]
        around_reset = rows.host["reset"].take(around)
        final = rows.host["final"].take(at)
        actions = rows.column("action", around[prefix - 1 :], device)
        if not actions.is_floating_point():
            actions = actions.long()
        reset = upload(around_reset[prefix:], device)
        begins = reset.view(*reset.shape, *[1] * (actions.dim() - 2))
        start_action = 0.0 if actions.is_floating_point() else -1
        columns = {name: rows.column(name, at, device) for name in rows.columns if name != "action"}
        observation, finals = torch.empty(*at.shape, 0, device=device), None
        if observations:
            first = prefix + 1 - self.layout.spec.frame_stack
            stacks = self._reader.read(around[first:], around_reset[first:], device)
            observation, finals = stacks.observation, self._finals(final, stacks)
        return Unrolls(
            observation=observation,
            reward=upload(rows.host["reward"].take(at), device),
            reset=reset,
            terminated=upload(rows.host["terminated"].take(at), device),
            truncated=upload(rows.host["truncated"].take(at), device),
            bootstrap=rows.final_values(final, device),
            previous_action=actions[:-1].masked_fill(begins, start_action),
            action=actions[1:],
            version=upload(rows.host["version"].take(at), device).long(),
            recurrent=rows.states(sample.slot, device),
            weight=upload(sample.weight, device),
            finals=finals,
            **columns,
        )

    def _finals(self, place: NDArray[np.int32], stacks: Stacks) -> Finals | None:
        """Stacks the final observations at places [U, B], those of the burn-in left out."""
        learned = place[self.layout.burn_in_steps + 1 :]
        row, column = np.nonzero(learned != NO_FINAL)
        if not len(row):
            return None
        step = row + self.layout.burn_in_steps  # by action: one less than the row of its arrival
        device, batch = stacks.table.device, place.shape[1]
        padded = -(-len(row) // batch) * batch
        _, _, depth, *shape = stacks.observation.shape
        observation = stacks.observation.new_zeros(padded, depth, *shape)
        older = upload(stacks.source[step, column, 1:].reshape(-1), device)
        observation[: len(row), :-1] = stacks.table.index_select(0, older).view(
            len(row), depth - 1, *shape
        )
        kept = self._rows.finals
        at = upload(learned[row, column].astype(np.int64), kept.frames.device)
        observation[: len(row), -1] = moved(kept.frames.index_select(0, at), device)
        padding = (0, padded - len(row))
        mask = None
        if kept.mask is not None:
            mask = torch.ones(padded, kept.mask.shape[1], dtype=torch.bool, device=device)
            mask[: len(row)] = moved(kept.mask.index_select(0, at), device)
        return Finals(
            observation=observation,
            step=upload(np.pad(step, padding), device),
            column=upload(np.pad(column, padding), device),
            valid=upload(np.arange(padded) < len(row), device),
            action_mask=mask,
        )

    def set_priority(
        self,
        slot: NDArray[np.int64],
        generation: NDArray[np.int64],
        priority: NDArray[np.floating[Any]],
    ) -> int:
        """Sets the priorities of sequences [n] that are still there; of one named twice, the last.

        Returns:
            How many were gone.

        Raises:
            ValueError: a priority is negative or not finite; then none is set.
        """
        if not (np.isfinite(priority) & (priority >= 0)).all():
            raise ValueError(f"priorities must be finite and not negative, got {priority}")
        here = self._rings.current(slot, generation)
        value = np.maximum(priority[here].astype(np.float64), LEAST_PRIORITY)
        self._tree.set(slot[here], value**self._priority_exponent)
        self._largest = max(self._largest, float(value.max(initial=0.0)))
        late = len(slot) - int(here.sum())
        self.late += late
        return late

    def forget_streams(self) -> None:
        """Says that every environment begins anew: their next segments start new streams."""
        self._rings.forget_streams()

    def state_dict(self) -> dict[str, Any]:
        """Returns everything, for a bit-equal resume; tensors are the replay's own."""
        return {
            "rows": self._rows.state_dict(),
            "rings": self._rings.state_dict(),
            "priorities": self._tree.state(),
            "largest": self._largest,
            "inserted": self.inserted,
            "sampled": self.sampled,
            "late": self.late,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave.

        Raises:
            ConfigError: it is that of a replay of another size.
        """
        self._rows.load_state_dict(state["rows"])
        self._rings.load_state_dict(state["rings"])
        self._tree.restore(state["priorities"])
        self._largest, self.late = state["largest"], state["late"]
        self.inserted, self.sampled = state["inserted"], state["sampled"]


def _undrawn(slot: NDArray[np.int64], generation: NDArray[np.int64]) -> Sample:
    return Sample(slot, generation, np.ones(len(slot), np.float32))


def _turns(env: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many segments of the same environment come before each of the segments [n]."""
    order = np.argsort(env, kind="stable")
    place = np.arange(len(env))
    is_first = np.append(True, np.diff(env[order]) != 0)[: len(env)]
    turn = np.empty(len(env), np.int64)
    turn[order] = place - np.maximum.accumulate(np.where(is_first, place, 0))
    return turn


def _only(segment: Segment, which: NDArray[np.int64]) -> Segment:
    """Returns the segments `which`, in this order."""
    at = torch.from_numpy(which)
    place = np.full(len(segment.env_id), -1, np.int64)
    place[which] = np.arange(len(which))
    finals = np.flatnonzero(place[segment.final_at[:, 0]] >= 0)
    final_at = segment.final_at[finals]
    of_final = torch.from_numpy(finals)
    return Segment(
        env_id=segment.env_id[which],
        run_id=segment.run_id[which],
        frames=segment.frames[at],
        columns={name: column[at] for name, column in segment.columns.items()},
        host={name: values[which] for name, values in segment.host.items()},
        recurrent=tuple(part[at] for part in segment.recurrent),
        final_frames=segment.final_frames[of_final],
        final_at=np.stack([place[final_at[:, 0]], final_at[:, 1]], axis=1),
        final_value=segment.final_value[of_final],
        final_mask=None if segment.final_mask is None else segment.final_mask[of_final],
    )
