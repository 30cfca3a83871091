"""What each of several learners does alike: meet the others before every update, and end together.

```
every learner    hold a batch ─▶ meet ─▶ update (gradients averaged) ─▶ hold the next ...
meet             who has a batch, what each has counted, whether the first one wants to end
```
They meet when they have a batch, or a few times a second: so the first learner knows what all have
counted and all hear of the end, even while a replay fills. An update is made when all have a batch.
What decides on it (progress, the end) is what was said there, so that all decide alike.
"""

from __future__ import annotations

import json
import time
from typing import Any, Protocol

import safetensors.torch

from headrace.algorithms.base import Algorithm, Averaging, Learners
from headrace.config import RunConfig
from headrace.errors import ConfigError
from headrace.learner.feeds import ReplayFeed
from headrace.learner.flattening import flatten, unflatten
from headrace.learner.group import Group
from headrace.learner.loop import Learner
from headrace.records import Update
from headrace.run.build import Parts
from headrace.run.report import Counts, counts_of
from headrace.run.seeds import Use, derived_seed
from headrace.telemetry.metrics import Waits

POLL_S = 0.2
"""Longest that a learner waits for a batch before it meets the others without one."""


class Meeting:
    """The meetings of one learner. For the learner's thread."""

    def __init__(self, group: Group, parts: Parts, *, config: RunConfig, agent_steps: int) -> None:
        """Goes on from `agent_steps` of earlier sessions; `config` is the run's."""
        self.group = group
        self.over = False
        """Whether all have heard that the run ends: at the same meeting."""
        self._others = Counts()
        self._parts = parts
        self._frames_per_step = parts.spec.action_repeat
        self._length, self._horizon = config.length, config.horizon
        self._agent_steps_before = agent_steps
        self.progress = 0.0
        """Share of the run that was done when they last met, the same for all."""
        self.schedule_progress = 0.0
        """Share of its schedules."""
        self._own_end = 0  # own agent steps at which this one has made its part of what is left
        self._count(agent_steps, own_steps=0, elapsed_s=0.0)
        # In lockstep after every batch of every pool: by the clock there would be no one order.
        self._every_s = 0.0 if config.lockstep else POLL_S
        self._met_s = time.monotonic()

    def read_others(self) -> Counts:
        """Returns what all but this one had counted when they last met."""
        return self._others

    def due(self) -> bool:
        """Whether to meet the others, batch or not."""
        return self.enough() or time.monotonic() - self._met_s >= self._every_s

    def enough(self) -> bool:
        """Whether this one has made its part of the steps that were left when they last met."""
        return self._parts.source.agent_steps >= self._own_end

    def meet(self, *, ready: bool, stop: bool, elapsed_s: float) -> bool:
        """Waits for all learners; returns whether each has a batch, and the run goes on.

        Args:
            ready: Whether this one has a batch.
            stop: Whether it wants the run to end; the first learner's wish counts.
            elapsed_s: What the run has taken; the first learner's clock counts.

        Raises:
            ExchangeFailed: another learner is gone.
        """
        own = counts_of(self._parts)
        # Until all are there the server goes on, and the others may come with all their part made:
        # of what is left then, this one's share is no less than that share of its own part.
        self._own_end -= (
            (self._own_end - own.agent_steps) * (self.group.count - 1) // (self.group.count)
        )
        rows = self.group.meet([ready, stop, round(1000 * elapsed_s), *own])
        self._met_s = time.monotonic()
        counts = [Counts(*row[3:]) for row in rows]
        others = (one for rank, one in enumerate(counts) if rank != self.group.rank)
        self._others = Counts(*map(sum, zip(*others, strict=True)))
        self._count(
            self._agent_steps_before + sum(one.agent_steps for one in counts),
            own_steps=own.agent_steps,
            elapsed_s=rows[0][2] / 1000,
        )
        self.over = bool(rows[0][1]) or self.progress >= 1.0
        return all(row[0] for row in rows) and not self.over

    def _count(self, agent_steps: int, *, own_steps: int, elapsed_s: float) -> None:
        env_frames = agent_steps * self._frames_per_step
        self.progress = self._length.progress(env_frames, elapsed_s)
        self.schedule_progress = self._horizon.progress(env_frames, elapsed_s)
        left = self._length.total_frames - env_frames
        self._own_end = own_steps + -(-left // (self._frames_per_step * self.group.count))


class Together(Protocol):
    """What `in_turns_together` drives: the first learner's session, or another's."""

    parts: Parts
    waits: Waits
    learner: Learner
    meeting: Meeting | None

    def over(self) -> bool:
        """Whether to end."""

    def learn(self, timeout_s: float) -> None:
        """Takes one update if all learners have a batch within `timeout_s`."""

    def attend(self) -> None:
        """Does what comes up besides."""


def in_turns_together(session: Together) -> None:
    """As `run.local.train_in_turns`, for one of several learners."""
    parts, meeting = session.parts, session.meeting
    while not session.over():
        session.attend()
        ready = session.learner.ready()
        if ready or (meeting is not None and meeting.due()):
            session.learn(timeout_s=0.0)
        if ready or session.over():
            continue
        for seat in parts.seats:
            seat.serve(parts.weights.pull, POLL_S, session.waits)


def learn_together(
    learner: Learner,
    meeting: Meeting,
    *,
    timeout_s: float,
    waits: Waits,
    stop: bool,
    elapsed_s: float,
) -> Update | None:
    """Takes one update if all have a batch; else keeps its own for the next call.

    `stop` and `elapsed_s` are told at the meeting; see `Meeting.meet`.
    """
    learner.go_on(meeting.schedule_progress)
    ready = learner.hold(timeout_s=min(timeout_s, POLL_S), waits=waits)
    before_s = time.perf_counter()
    goes_on = meeting.meet(ready=ready, stop=stop, elapsed_s=elapsed_s)
    if ready:
        waits.add("learner_for_learners", time.perf_counter() - before_s)
    if not goes_on:
        return None
    return learner.learn(progress=meeting.schedule_progress, timeout_s=0.0, waits=waits)


def share_learning(parts: Parts, group: Group) -> None:
    """Has gradients and statistics averaged from now on.

    Raises:
        ConfigError: the algorithm averages none.
    """
    algorithm = parts.algorithm
    ensure_shares(type(algorithm))
    learners: Learners = group
    algorithm.learners = learners
    for module in algorithm.model.modules():
        if isinstance(module, Averaging):
            module.learners = learners
    if isinstance(parts.feed, ReplayFeed):
        parts.feed.replay.scales_weights = False


def ensure_shares(rule: type[Algorithm]) -> None:
    """Refuses an algorithm that learns alone.

    Raises:
        ConfigError: it does.
    """
    if not rule.averages_gradients:
        raise ConfigError(
            f"{rule.__name__} does not average its gradients over several learners "
            "(`averages_gradients` of headrace.Algorithm): leave out --learner-devices"
        )


def spread_state(parts: Parts, group: Group, *, seed: int) -> None:
    """Gives all learners the first one's weights, optimiser, statistics and random state.

    `seed` is of this session: what a learner draws for its share begins elsewhere in each.
    """
    algorithm = parts.algorithm
    data = None
    if group.rank == 0:
        training, skeleton = flatten(algorithm.state_dict())
        groups = {"weights": algorithm.model.state_dict(), "training": training}
        tensors = {
            f"{name}/{key}": tensor.detach().cpu().contiguous().clone()
            for name, named in groups.items()
            for key, tensor in named.items()
        }
        data = safetensors.torch.save(tensors, {"skeleton": json.dumps(skeleton)})
    data = group.spread(data)
    if group.rank == 0:
        return
    tensors = safetensors.torch.load(data)
    named = {
        prefix: {
            key.removeprefix(prefix): tensor
            for key, tensor in tensors.items()
            if key.startswith(prefix)
        }
        for prefix in ("weights/", "training/")
    }
    algorithm.model.load_state_dict(named["weights/"])
    algorithm.load_state_dict(unflatten(named["training/"], _skeleton(data)))
    algorithm.draw_apart(derived_seed(seed, Use.RANK_UPDATES, group.rank))


def _skeleton(data: bytes) -> Any:
    """Reads the metadata at the head of a safetensors file, which the library does not give."""
    nbytes = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + nbytes])["__metadata__"]["skeleton"])
