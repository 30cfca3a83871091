"""Where rows go and which sequences are whole: the replay's bookkeeping, numbers only."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.experience.replay_layout import ReplayLayout

NO_RUN = -1


class Advance(NamedTuple):
    """What one segment each of n environments changes."""

    start: NDArray[np.int64]  # [n] number of the row at which each segment starts
    fresh: NDArray[np.bool_]  # [n] a new stream begins there
    born: NDArray[np.int64]  # slots of sequences that are now whole
    died: NDArray[np.int64]  # slots of sequences that lost rows that they need


class Rings:
    """One ring of rows per environment; its rows are numbered from 0 for ever."""

    def __init__(self, layout: ReplayLayout) -> None:
        self._layout = layout
        self._ring_rows, self._slots_per_env = layout.ring_rows, layout.slots_per_env
        self._last = np.full(layout.num_envs, -1, np.int64)  # row that was written last
        self._begin = np.zeros(layout.num_envs, np.int64)  # first row of the stream
        self._run_id = np.full(layout.num_envs, NO_RUN, np.int64)
        self._start = np.zeros(layout.num_slots, np.int64)  # first row of the slot's sequence
        self._generation = np.zeros(layout.num_slots, np.int64)  # sequences that died here
        self._alive = np.zeros(layout.num_slots, np.bool_)
        self._drawn = np.zeros(layout.num_slots, np.bool_)  # at least once, of those alive
        self._drawn_before = 0  # at least once, of those that died
        self.sequences = 0
        # Most multiples of the stride that one segment passes, a jump to a new stream included.
        self._width = (layout.alignment + layout.segment_steps) // layout.stride_steps + 2

    @property
    def nbytes(self) -> int:
        """Bytes of all this."""
        return self._drawn.nbytes + sum(array.nbytes for array in self._arrays().values())

    def advance(self, env: NDArray[np.int64], run_id: NDArray[np.int64]) -> Advance:
        """Makes room for one segment of each environment [n], no environment twice."""
        layout, before = self._layout, self._last[env]
        fresh = self._run_id[env] != run_id
        jump = (before // layout.alignment + 1) * layout.alignment
        start = np.where(fresh, jump, before)
        after = start + layout.segment_steps
        self._begin[env[fresh]] = start[fresh]
        self._run_id[env], self._last[env] = run_id, after
        # A row is lost R rows later; a sequence also needs the `prefix` rows before its first.
        margin = layout.prefix - self._ring_rows
        died, number = self._starts(env, before + margin, after + margin)
        died = died[self._alive[died] & (self._start[died] == number)]
        self._alive[died] = False
        self._drawn_before += int(np.count_nonzero(self._drawn[died]))
        self._drawn[died] = False
        self._generation[died] += 1
        whole = np.maximum(before - layout.sequence_steps, self._begin[env] - 1)
        born, number = self._starts(env, whole, after - layout.sequence_steps)
        self._start[born], self._alive[born] = number, True
        self.sequences += len(born) - len(died)
        return Advance(start, fresh, born, died)

    def segment_rows(self, env: NDArray[np.int64], start: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the rows of segments [n] lie: [n, c + 1]."""
        number = start[:, None] + np.arange(self._layout.segment_steps + 1)
        return env[:, None] * self._ring_rows + number % self._ring_rows

    def sequence_rows(self, slot: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the rows of sequences [B] lie, `prefix` rows before them included: [.., B]."""
        layout = self._layout
        offset = np.arange(-layout.prefix, layout.sequence_steps + 1)
        number = self._start[slot] + offset[:, None]
        return slot // self._slots_per_env * self._ring_rows + number % self._ring_rows

    def slot(self, env: NDArray[np.int64], number: NDArray[np.int64]) -> NDArray[np.int64]:
        """Slots of sequences of `env` that start at the rows `number`."""
        in_ring = number // self._layout.stride_steps % self._slots_per_env
        return env * self._slots_per_env + in_ring

    def generation(self, slot: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tells apart the sequences that lie in a slot one after the other."""
        return self._generation[slot]

    def current(self, slot: NDArray[np.int64], generation: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each slot [n] still holds the sequence of that generation."""
        here: NDArray[np.bool_] = self._alive[slot] & (self._generation[slot] == generation)
        return here

    @property
    def drawn(self) -> int:
        """Sequences that were drawn at least once, those that died since included."""
        return self._drawn_before + int(np.count_nonzero(self._drawn))

    def draw(self, slot: NDArray[np.int64]) -> None:
        """Notes that the sequences in slots [B] were drawn."""
        self._drawn[slot] = True

    def forget_streams(self) -> None:
        """The next segment of every environment begins a new stream."""
        self._run_id[:] = NO_RUN

    def state_dict(self) -> dict[str, Any]:
        """Returns everything."""
        counts = {"sequences": self.sequences, "drawn_before": self._drawn_before}
        return {**self._arrays(), "drawn": self._drawn, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave.

        Where it is from before draws were noted, all that came so far counts as drawn.
        """
        for name, array in self._arrays().items():
            array[:] = state[name]
        self.sequences = state["sequences"]
        self._drawn[:] = state.get("drawn", self._alive)
        self._drawn_before = state.get("drawn_before", int(self._generation.sum()))

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {
            "last": self._last,
            "begin": self._begin,
            "run_id": self._run_id,
            "start": self._start,
            "generation": self._generation,
            "alive": self._alive,
        }

    def _starts(
        self, env: NDArray[np.int64], above: NDArray[np.int64], upto: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Slots and first rows of the sequences that start in (above, upto] of each environment."""
        stride = self._layout.stride_steps
        first = (above // stride + 1) * stride
        number = first[:, None] + stride * np.arange(self._width)
        within = number <= upto[:, None]
        env = np.broadcast_to(env[:, None], number.shape)
        return self.slot(env[within], number[within]), number[within]
