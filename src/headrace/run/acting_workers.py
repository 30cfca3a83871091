"""The parent's side of `--inference worker`: acting workers, supervised, and what they share.

    parent                      shared memory                      worker w
    learner: weights.publish -> weights, with a sequence --------> pull
    learner: unrolls.gather  <- slots of all workers <------------ unrolls.append
    check: agent_steps       <- tally, a row per worker <--------- after every batch of steps
    check                    <- episodes and waits, as messages -- every 0.2 s

`pools.crew` starts the workers, notices which one died or hangs, and starts it again.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.algorithms.base import ExperienceSpec
from headrace.config import RunConfig, to_dict
from headrace.errors import ConfigError
from headrace.experience.shared import Columns, SharedSlots, shares, table_nbytes
from headrace.experience.unrolls import Allocate, UnrollTable
from headrace.pools.crew import Crew
from headrace.pools.memory import anonymous_block
from headrace.pools.processes import WorkerProcess
from headrace.resources import usable_cores
from headrace.server.server import OnEpisodes
from headrace.specs import EnvSpec
from headrace.telemetry.metrics import Waits
from headrace.transport.messages import describe
from headrace.weights import SharedWeights, Weights, shared_nbytes

WORKER_MODULE = "headrace.run.acting_worker"

STEPS, BEATS, UNFINISHED, DROPPED, ENOUGH = range(5)
"""Columns of the tally: agent steps, rounds of the loop (waiting ones too), unrolls under
construction that have rows, unrolls dropped; in the first row, at how many steps of all that live
they pause, for the parent to say."""
_TALLY_ROW = 8  # int64: a cache line for each worker


def tally_of(block: Any) -> NDArray[np.int64]:
    """Returns the tally [workers, 8] that lies in `block`."""
    return np.frombuffer(block, np.int64).reshape(-1, _TALLY_ROW)


def make_table(
    spec: EnvSpec,
    model: Any,
    queue: Any,
    *,
    num_envs: int,
    experience: ExperienceSpec,
    num_slots: int,
    allocate: Allocate,
) -> UnrollTable:
    """Lays the table of all workers' slots; parent and workers come to the same one.

    Args:
        spec: Of the environments.
        model: The policy, for its recurrent state.
        queue: This side's end of the slots.
        num_envs: Environments that write here: a worker's own, none in the parent.
        experience: How unrolls are cut and kept.
        num_slots: Of all workers.
        allocate: Gives the shared columns.
    """
    return UnrollTable(
        spec,
        num_envs=num_envs,
        experience=experience,
        num_slots=num_slots,
        queue=queue,
        recurrent=model.initial_state(1),
        device=torch.device("cpu"),
        allocate=allocate,
    )


class Turnarounds:
    """How long workers take to answer a batch, each by its own account."""

    def __init__(self) -> None:
        self._newest: dict[int, tuple[float, float]] = {}

    def add(self, worker: int, p50_s: float, p99_s: float) -> None:
        """Keeps a worker's newest quantiles."""
        self._newest[worker] = p50_s, p99_s

    def read(self) -> tuple[float, float]:
        """Returns the median of the workers' p50 and the slowest p99; NaN before the first."""
        if not self._newest:
            return math.nan, math.nan
        p50_s, p99_s = np.array(list(self._newest.values())).T
        return float(np.median(p50_s)), float(p99_s.max())


class ActingWorkers:
    """Everything that steps and acts, seen from the learner. For one thread.

    `queue`, `unrolls` and `weights` are the learner's ends.
    """

    def __init__(
        self,
        config: RunConfig,
        spec: EnvSpec,
        model: Any,
        *,
        experience: ExperienceSpec,
        capacity: int,
        groups: int,
        resume_count: int,
        local: Weights | None = None,
    ) -> None:
        """Reserves all memory; `start` starts the workers.

        Args:
            config: The run's settings.
            spec: Of the environments.
            model: As workers have it: on the CPU, in their precision.
            experience: How unrolls are cut and kept.
            capacity: Full unrolls that may wait for the learner.
            groups: See `experience.shared.shares`.
            resume_count: Sessions of the run before this one.
            local: Weights of an evaluation's server in this process.

        Raises:
            ConfigError: there is too little memory.
        """
        num_envs, unit = config.server.num_envs, spec.envs_together
        workers = min(config.workers.num_workers or usable_cores(), num_envs // unit)
        threads = config.env_threads or max(1, usable_cores() // workers)
        self._config = dataclasses.replace(config, env_threads=threads)
        self._spec = spec
        self._resume_count = resume_count
        self._shares = shares(
            num_envs, workers=workers, capacity=capacity, groups=groups, unit=unit
        )
        self._num_slots = sum(share.num_slots for share in self._shares)
        self._crew: Crew | None = None
        full_fd, self._full_end = os.pipe()
        self._open_fds = [full_fd, self._full_end]
        self.queue = SharedSlots(self._shares, capacity=capacity, full_fd=full_fd, send=self._send)

        def table(allocate: Allocate) -> UnrollTable:
            return make_table(
                spec,
                model,
                self.queue,
                num_envs=0,
                experience=experience,
                num_slots=self._num_slots,
                allocate=allocate,
            )

        self._fds: dict[str, int] = {}  # of the blocks
        try:
            unrolls = self._block("unrolls", table_nbytes(table))
            weights = self._block("weights", shared_nbytes(model))
            tally = self._block("tally", workers * _TALLY_ROW * 8)
        except ConfigError:
            self.close()
            raise
        self.unrolls = table(Columns(unrolls))
        self.weights = SharedWeights(model, weights, local=local)
        self._tally = tally_of(tally)
        self._beats = np.zeros(workers, np.int64)  # at the last check
        self._steps_before = 0  # of workers that are dead
        self._most_steps = 2**62
        self.pause_at(self._most_steps)
        self._dropped_before = 0
        self._waits: list[Mapping[str, float]] = []
        self._on_episodes: OnEpisodes = _nobody
        self.turnaround_s = Turnarounds()

    def start(self, on_episodes: OnEpisodes, on_message: Callable[[str], None]) -> None:
        """Starts the workers; returns before they are ready. They wait for the first weights.

        Args:
            on_episodes: Told of episodes that ended, by number of the environment.
            on_message: Told what is worth a line, such as a worker that died.
        """
        self._on_episodes = on_episodes
        self._crew = Crew(
            self._start_worker,
            [self._label(worker) for worker in range(len(self._shares))],
            groups=1,
            config=self._config.workers,
            on_death=self._bury,
            on_message=on_message,
        )

    def pause_at(self, agent_steps: int) -> None:
        """Has all workers pause once they have made so many steps: less than a batch of each more.

        They look before every batch, so the learner may be in an update.
        """
        self._most_steps = agent_steps
        self._tally[0, ENOUGH] = agent_steps - self._steps_before

    @property
    def agent_steps(self) -> int:
        """Steps that all workers have made, those that died included."""
        return self._steps_before + int(self._tally[:, STEPS].sum())

    @property
    def dropped_unrolls(self) -> int:
        """Unrolls that were never finished, since a worker died or an environment began anew."""
        return self._dropped_before + int(self._tally[:, DROPPED].sum())

    @property
    def deaths(self) -> int:
        """Workers that have died so far."""
        return 0 if self._crew is None else self._crew.deaths

    def unfinished(self) -> int:
        """Number of unrolls under construction: what a run that stops here loses."""
        return int(self._tally[:, UNFINISHED].sum())

    def check(self, waits: Waits) -> None:
        """Looks after the workers: to be called a few times a second.

        Args:
            waits: Gets the workers' own, as means over all of them.

        Raises:
            PeerLost: a worker died too often in a row; with the first cause.
        """
        if self._crew is None:
            return
        beats = self._tally[:, BEATS].copy()
        for worker in np.flatnonzero(beats != self._beats).tolist():
            # To the crew a worker is given a group, and must give it back before a deadline.
            self._crew.returned(worker)
            self._crew.ask(worker, b"", 1)
        self._beats = beats
        self._crew.look()
        for seconds in self._waits:
            for name, value in seconds.items():
                waits.add(name, value / len(self._shares))
        self._waits.clear()

    def close(self) -> None:
        """Ends the workers and gives the memory back; a second call does nothing."""
        if self._crew is not None:
            self._crew.close()
        for fd in self._open_fds:
            os.close(fd)
        self._open_fds.clear()

    def _block(self, name: str, nbytes: int) -> Any:
        self._fds[name], memory = anonymous_block(nbytes)
        self._open_fds.append(self._fds[name])
        return memory

    def _start_worker(self, worker: int, generation: int) -> WorkerProcess:
        share = self._shares[worker]
        settings = {
            "config": to_dict(self._config),
            "worker": worker,
            "workers": len(self._shares),
            "generation": generation,
            "resume_count": self._resume_count,
            "share": share,
            "spec": describe(self._spec),
            "num_slots": self._num_slots,
            "free": self.queue.begin(worker, generation),
            "fds": self._fds,
            "full_fd": self._full_end,
        }
        return _Reporting(
            lambda message: self._take(worker, message),
            settings,
            name=f"headrace worker {worker}",
            pass_fds=(*self._fds.values(), self._full_end),
        )

    def _send(self, worker: int, data: bytes) -> None:
        if self._crew is not None:
            self._crew.ask(worker, data, 0)

    def _take(self, worker: int, message: Mapping[str, Any]) -> None:
        self._waits.append(message["waits"])
        self.turnaround_s.add(worker, *message["turnaround_s"])
        if message["episodes"]:
            env, returns, lengths, infos = zip(*message["episodes"], strict=True)
            first = self._shares[worker].first_env
            self._on_episodes(
                np.array(env, np.int32) + first, np.array(returns), np.array(lengths), list(infos)
            )

    def _bury(self, worker: int) -> None:
        """Keeps what a worker has left: full unrolls and counts."""
        self.queue.end(worker)
        row = self._tally[worker]
        self._steps_before += int(row[STEPS])
        self._dropped_before += int(row[DROPPED] + row[UNFINISHED])
        row[:ENOUGH] = 0
        self.pause_at(self._most_steps)
        self._beats[worker] = 0

    def _label(self, worker: int) -> str:
        share = self._shares[worker]
        last = share.first_env + share.num_envs - 1
        return f"worker {worker} (environments {share.first_env}..{last} of {self._config.env})"


class _Reporting(WorkerProcess):
    """A worker whose reports go where they belong, whoever asks for its messages."""

    def __init__(
        self,
        on_report: Callable[[Mapping[str, Any]], None],
        settings: Mapping[str, Any],
        *,
        name: str,
        pass_fds: Sequence[int],
    ) -> None:
        super().__init__(WORKER_MODULE, settings, name=name, pass_fds=pass_fds)
        self._on_report = on_report

    def messages(self) -> list[dict[str, Any]]:
        """Returns what is not a report."""
        rest = []
        for message in super().messages():
            if "episodes" in message:
                self._on_report(message)
            else:
                rest.append(message)
        return rest


def _nobody(*_: Any) -> None:
    """Hears nothing."""
