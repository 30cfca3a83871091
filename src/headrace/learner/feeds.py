"""Where the learner's batches come from: full unrolls in their order, or a replay's samples.

```
first in, first out    slots that are full ──▶ batch, slots free again
replay                 slots that are full ──▶ replay ──▶ batch ──▶ update
                                                 ▲                    │
                                                 └──── priorities ────┘
```
A feed belongs to the learner's thread, and so does a replay: nothing there needs a lock. Another
thread may draw the next batch, while the learner's is busy with an update and keeps away. Where the
limiter holds inserts back, slots stay full, and whoever fills them waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.algorithms.base import Beside, ExperienceSpec
from headrace.errors import DeadlineExceeded
from headrace.experience.fifo import Slots, any_slot
from headrace.experience.limiter import SampleLimiter
from headrace.experience.replay import Replay, Sample
from headrace.experience.segments import Segment
from headrace.learner.batches import align, moved
from headrace.records import Batch, Unrolls, Update
from headrace.rows import read_later
from headrace.telemetry.metrics import Waits


class Feed(Protocol):
    """What gives the learner its batches."""

    def next(self, *, version: int, timeout_s: float, waits: Waits) -> Batch | None:
        """Returns a batch on the learner's device; None if none could be made in `timeout_s`."""

    def learned(self, update: Update) -> None:
        """Takes what the update of the last batch said of it."""

    def ready(self) -> bool:
        """Whether `next` has something to do at once."""

    def example(self) -> Batch:
        """Returns a batch of the right shapes, whatever is in it."""

    def metrics(self) -> dict[str, float | int]:
        """Returns counts and means for a row of metrics."""


class Filled(Protocol):
    """Where full slots lie, such as an `experience.unrolls.UnrollTable`."""

    def gather(self, slots: list[int]) -> Unrolls:
        """See `UnrollTable.gather`."""

    def segments(self, slots: list[int]) -> Segment:
        """See `UnrollTable.segments`."""

    def oldest_version(self, slot: int) -> int:
        """See `UnrollTable.oldest_version`."""


class FifoFeed:
    """Every unroll once, oldest first."""

    def __init__(
        self,
        unrolls: Filled,
        queue: Slots,
        *,
        batch_unrolls: int,
        device: torch.device,
        max_policy_lag: int | None = None,
    ) -> None:
        """Takes both ends of the slots.

        Unrolls whose first row is more than `max_policy_lag` updates old are dropped, and counted
        by the queue; None keeps all.
        """
        self._unrolls, self._queue = unrolls, queue
        self._batch_unrolls, self._device = batch_unrolls, device
        self._max_policy_lag = max_policy_lag
        self._learned_unrolls = 0

    def next(self, *, version: int, timeout_s: float, waits: Waits) -> Batch | None:
        """Borrows the oldest slots, copies them, and gives them back."""

        def is_fresh(slot: int) -> bool:
            bound = self._max_policy_lag
            return bound is None or version - self._unrolls.oldest_version(slot) <= bound

        before_s = time.perf_counter()
        try:
            with self._queue.reading(
                self._batch_unrolls,
                timeout_s=timeout_s,
                keep=any_slot if self._max_policy_lag is None else is_fresh,
            ) as slots:
                waits.add("learner_for_unrolls", time.perf_counter() - before_s)
                self._learned_unrolls += len(slots)
                return moved(align(self._unrolls.gather(slots)), self._device)
        except DeadlineExceeded:
            waits.add("learner_for_unrolls", time.perf_counter() - before_s)
            return None

    def learned(self, update: Update) -> None:
        """Has nothing to keep: the unrolls are gone."""

    def ready(self) -> bool:
        """Whether a batch of unrolls is full."""
        return len(self._queue) >= self._batch_unrolls

    def example(self) -> Batch:
        """Copies the first slots, full or not."""
        slots = list(range(self._batch_unrolls))
        return moved(align(self._unrolls.gather(slots)), self._device)

    def metrics(self) -> dict[str, float | int]:
        """Returns the share of the unrolls that came which were learned from.

        The others still wait, or were too old.
        """
        learned = self._learned_unrolls
        came = learned + len(self._queue) + self._queue.stale
        return {"samples_used_share": learned / came} if came else {}


class ReplayFeed:
    """Sequences from a replay, which takes the unrolls in as the limiter lets it."""

    def __init__(
        self,
        unrolls: Filled,
        queue: Slots,
        replay: Replay,
        limiter: SampleLimiter,
        *,
        experience: ExperienceSpec,
        device: torch.device,
        seed: int,
        initial_priority: Callable[[Batch], Tensor] | None = None,
    ) -> None:
        """Takes the parts.

        Args:
            unrolls: Where segments arrive.
            queue: Which of them are full.
            replay: Where they go.
            limiter: How often they may come out.
            experience: How many sequences make a batch, and what one unroll brings.
            device: Of the learner.
            seed: Of the draws.
            initial_priority: Says from a batch without observations what new sequences are worth;
                None for as much as the best ones.
        """
        self.replay, self.limiter = replay, limiter
        self._unrolls, self._queue = unrolls, queue
        self._settings = None if experience.replay is None else experience.replay.settings
        self._batch_sequences, self._device = experience.unrolls_per_call, device
        self._at_once, self._most = insert_sizes(experience)
        self._rng = np.random.default_rng(seed)
        self._initial_priority = initial_priority
        self._drawn: Sample | None = None  # the batch that is being learned from
        self._under_way: list[tuple[Sample, Callable[[], NDArray[np.float32]]]] = []
        self._age: Tensor | None = None
        self.beside: Beside | None = None
        """Draws the next batch while one is learned from, whose priorities it then does not know
        yet; None to draw only when asked."""
        self._ahead: Callable[[], tuple[Sample, Batch]] | None = None

    def go_on(self, progress: float) -> None:
        """Sets the importance exponent of the samples to come."""
        if self._settings is not None:
            self.replay.importance_exponent = self._settings.importance_exponent_at(progress)

    def next(self, *, version: int, timeout_s: float, waits: Waits) -> Batch | None:
        """Takes in what has come and may, then samples if that may be; else waits for unrolls."""
        until_s = time.monotonic() + timeout_s
        while True:
            ahead = self._joined()
            self._ahead = None
            self._take_in(waiting=len(self._queue))
            if ahead is None and self._may_sample():
                ahead = self._draw()
            if ahead is not None:
                self._drawn, batch = ahead
                self._age = (version - batch.version).float().mean()
                if self.beside is not None and self._may_sample():
                    self._ahead = self.beside(self._draw)
                return batch
            left_s = until_s - time.monotonic()
            if left_s <= 0.0:
                return None
            before_s = time.perf_counter()
            self._queue.wait_for_full(left_s)
            waits.add("learner_for_unrolls", time.perf_counter() - before_s)

    def learned(self, update: Update) -> None:
        """Gives the sampled sequences their new priorities; on a GPU, those of the update before.

        There they arrive while the next update is computed, so that nobody waits.
        """
        self._joined()
        self.settle()
        if self._drawn is not None and update.priority is not None:
            self._prioritise(self._drawn, update.priority)
        self._drawn = None

    def settle(self) -> None:
        """Hands priorities on that are still under way."""
        under_way, self._under_way = self._under_way, []
        for sample, read in under_way:
            priority = read()
            # A loss that is not finite ends the run (`learner.loop`), and must do it by its name.
            known = np.isfinite(priority)
            self.replay.set_priority(sample.slot[known], sample.generation[known], priority[known])

    def _prioritise(self, sample: Sample, priority: Tensor) -> None:
        self._under_way.append((sample, read_later(priority)))
        if not priority.is_cuda:
            self.settle()

    def ready(self) -> bool:
        """Whether something may be taken in or sampled."""
        return (
            self._ahead is not None
            or self._may_sample()
            or (len(self._queue) > 0 and self._may_insert(self._most // self._at_once))
        )

    def _may_sample(self) -> bool:
        return self.replay.sequences > 0 and self.limiter.may_sample(self._batch_sequences)

    def _may_insert(self, count: int) -> bool:
        # A small replay can lose all its sequences when all environments start anew.
        return self.replay.sequences == 0 or self.limiter.may_insert(count)

    def example(self) -> Batch:
        """Gathers what lies in the first slot, as often as a batch has sequences."""
        return align(self.replay.example(self._batch_sequences, self._device))

    def metrics(self) -> dict[str, float | int]:
        """Returns how full the replay is, and how often what it holds was sampled.

        samples_used_share is the share of all sequences that ever came which were sampled once or
        more; those that came last have not had many chances yet.
        """
        replay = self.replay
        row: dict[str, float | int] = {
            "replay_sequences": replay.sequences,
            "replay_inserted": replay.inserted,
            "replay_sampled": replay.sampled,
            "samples_per_insert": replay.sampled / max(1, replay.inserted),
            "replay_late_priorities": replay.late,
        }
        if replay.inserted:
            row["samples_used_share"] = replay.used / replay.inserted
        if self._age is not None:
            row["replay_age_updates"] = float(self._age)
        return row

    def state_dict(self) -> dict[str, Any]:
        """Returns replay, counts and random state; what is under way is waited for.

        A batch that was drawn ahead is not saved: it counts as sampled.
        """
        self._joined()
        self.settle()
        return {
            "replay": self.replay.state_dict(),
            "limiter": self.limiter.state_dict(),
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any], *, streams_go_on: bool) -> None:
        """Puts back what `state_dict` gave.

        `streams_go_on` says whether the environments go on where they were; else what comes next
        belongs to no sequence that was begun.
        """
        self.replay.load_state_dict(state["replay"])
        self.limiter.load_state_dict(state["limiter"])
        self._rng.bit_generator.state = state["rng"]
        if not streams_go_on:
            self.replay.forget_streams()

    def _take_in(self, *, waiting: int) -> None:
        """Moves up to `waiting` full slots into the replay, as far as the limiter lets it."""
        while waiting > 0:
            count = min(waiting, self._at_once)
            while count and not self._may_insert(count * self._most // self._at_once):
                count //= 2
            if not count:
                return
            try:
                with self._queue.reading(count, timeout_s=0.0) as slots:
                    segment = self._unrolls.segments(slots)
                    new = self.replay.insert(segment)
            except DeadlineExceeded:  # a worker has died, and its slots with it
                return
            self.limiter.inserted(len(new.slot))
            if self._initial_priority is not None and len(new.slot):
                said = align(self.replay.gather(new, self._device, observations=False))
                self._prioritise(new, self._initial_priority(said))
            waiting -= count

    def _draw(self) -> tuple[Sample, Batch]:
        drawn = self.replay.sample(self._batch_sequences, self._rng)
        self.limiter.sampled(self._batch_sequences)
        return drawn, align(self.replay.gather(drawn, self._device))

    def _joined(self) -> tuple[Sample, Batch] | None:
        """Waits until nobody else is at the replay; returns the batch that was drawn ahead."""
        return None if self._ahead is None else self._ahead()


def insert_sizes(experience: ExperienceSpec) -> tuple[int, int]:
    """Returns the most unrolls that are inserted at once, and the most sequences that they bring.

    These are about as many as are sampled at once, or as four calls of `update` are due for: the
    limiter holds the ratio that closely.
    """
    replay = experience.replay
    per_unroll = 1 if replay is None else -(-experience.unroll_steps // replay.stride_steps)
    ratio = 0.0 if replay is None else replay.settings.samples_per_insert
    sequences = experience.unrolls_per_call * min(1.0, 4.0 / max(1.0, ratio))
    at_once = max(1, int(sequences) // per_unroll)
    return at_once, at_once * per_unroll
