"""Environments in worker processes, which share one table with the server.

    server                    table, a row per environment              worker w
    receive  <-- record (w, group, generation), one pipe for all -----  steps group 0
    reads the rows            observation, reward, flags ...            writes the rows
    writes the rows           action                                    reads the rows
    reply    --- number of the group, a pipe per worker ------------->  steps group 1 meanwhile

The rows of a worker stand side by side, and its groups go together where they can (`batcher`): with
environments that cost little, a batch then comes from one worker, in one stretch of the table that
is handed out without a copy, for one message there and one back.

Measured between two processes on two cores: pipe, eventfd, socket, futex and semaphore all take
about 70 us there and back, nearly all of it the scheduler's. A pipe is also the message and, at its
end, the news of a death; and it is everywhere. Nobody spins: the core belongs to the learner.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.errors import PeerLost
from headrace.pools.batcher import Batcher
from headrace.pools.checks import check_batch
from headrace.pools.crew import Crew
from headrace.pools.memory import anonymous_block
from headrace.pools.processes import WorkerProcess
from headrace.pools.settings import WorkerConfig
from headrace.pools.shm_layout import (
    GROUP,
    RECORD,
    Table,
    layout,
    lend,
)
from headrace.resources import usable_cores
from headrace.specs import EnvSpec, check_action, vectors_of
from headrace.steps import EnvStep
from headrace.transport.messages import describe

WORKER_MODULE = "headrace.run.worker"
_PIPE_NBYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerEnvs:
    """What a worker needs to make its environments, in plain values."""

    env: str
    """Name, as the user typed it."""
    settings: Mapping[str, Any]
    """Fields of the family's config."""
    spec: EnvSpec
    num_envs: int
    """Of all workers together."""
    seed: int
    first_env: int = 0
    """Number of the first one within the run, where there are others elsewhere."""
    draws_apart: bool = False
    """Whether each has global random states of its own."""


def blocks_of(
    num_envs: int, *, workers: int, groups: int, max_envs: int
) -> list[list[tuple[int, int]]]:
    """Cuts environments into blocks, as even as possible, and these into the groups of workers.

    Args:
        num_envs: of all workers.
        workers: at most num_envs.
        groups: wanted of each worker; more are made where a block would exceed `max_envs`, fewer
            where there are not so many environments.
        max_envs: of a block.

    Returns:
        First row and the row behind the last, of each block of each worker.
    """
    groups = max(min(groups, num_envs // workers), -(-num_envs // (workers * max_envs)))
    count = min(workers * groups, num_envs)  # the last workers may have one group less
    bounds = [num_envs * block // count for block in range(count + 1)]
    blocks = itertools.pairwise(bounds)
    return [
        list(itertools.islice(blocks, len(range(worker, count, workers))))
        for worker in range(workers)
    ]


class ShmPool:
    """Worker processes as a pool. For one thread."""

    def __init__(
        self,
        recipe: WorkerEnvs,
        *,
        batch_size: int,
        workers: WorkerConfig,
        on_message: Callable[[str], None] = lambda _: None,
        full_batches: bool = False,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the workers; they are ready when their rows come.

        Args:
            recipe: the environments.
            batch_size: most rows of a batch.
            workers: how many, in how many groups, and when one is given up.
            on_message: told what is worth a line, such as a worker that died.
            full_batches: give all environments or none, whatever they wait for.
            now_s: the clock.

        Raises:
            ConfigError: the sizes do not fit, or there is too little memory.
        """
        num_envs = recipe.num_envs
        spec = recipe.spec
        unit = spec.envs_together
        check_batch(batch_size, num_envs, full=full_batches, unit=unit)
        self.spec = spec
        self.num_envs = num_envs
        self.max_batch = batch_size
        self._recipe = recipe
        self._workers = min(workers.num_workers or usable_cores(), num_envs // unit)
        if spec.vector_envs is None:
            self._groups = blocks_of(
                num_envs,
                workers=self._workers,
                groups=workers.groups_per_worker,
                max_envs=batch_size,
            )
        else:  # what a worker's vectors are: one, where a batch holds it
            units = num_envs // unit
            shares = [
                unit * (units * worker // self._workers) for worker in range(self._workers + 1)
            ]
            self._groups = [
                [
                    (first + low, first + high)
                    for low, high in vectors_of(end - first, most=batch_size, unit=unit)
                ]
                for first, end in itertools.pairwise(shares)
            ]
        self._blocks = [block for groups in self._groups for block in groups]
        whose = [(w, g) for w, groups in enumerate(self._groups) for g in range(len(groups))]
        self._whose = whose  # worker and group of each block
        self._block_at = {place: block for block, place in enumerate(whose)}
        self._line = Batcher(
            [end - first for first, end in self._blocks],
            max_envs=batch_size,
            teams=[worker for worker, _ in whose],
            max_wait_s=np.inf if full_batches else workers.batch_wait_ms / 1000.0,
            now_s=now_s,
        )
        self._now_s = now_s
        self._lent: list[int] = []  # blocks received and not replied to
        self._lent_rows: slice | NDArray[np.int32] = slice(0, 0)
        self._lent_count = 0  # of these rows
        plan = layout(recipe.spec, num_envs)
        self._block_fd, memory = anonymous_block(plan.nbytes)
        self._table: Table | None = Table(memory, plan)
        self._stretches: dict[tuple[int, int], EnvStep] = {}  # views of rows, made once
        self._ready_fd, self._ready_end = os.pipe()
        os.set_blocking(self._ready_fd, False)
        self._crew = Crew(
            self._start_worker,
            [self._label(worker) for worker in range(self._workers)],
            groups=[len(groups) for groups in self._groups],
            config=workers,
            on_death=self._drop,
            on_message=on_message,
            now_s=now_s,
        )
        self._crew.watch(self._ready_fd)

    @property
    def deaths(self) -> int:
        """Workers that have died so far."""
        return self._crew.deaths

    @property
    def lines_printed(self) -> int:
        """Lines that workers have printed so far."""
        return self._crew.lines_printed

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that live."""
        return self._crew.pids()

    def receive(self, timeout_s: float) -> EnvStep | None:
        """Returns the rows of a batch that is due; None after `timeout_s`.

        Raises:
            PeerLost: the pool was closed, or a worker died too often in a row.
            RuntimeError: the last batch was not replied to.
        """
        table = self._open_table()
        if self._lent:
            raise RuntimeError("receive came twice: reply to the last batch first")
        self._crew.back()
        until_s = self._now_s() + timeout_s
        while True:
            self._collect()
            self._crew.look()
            self._lent = sorted(self._line.take())
            if self._lent:
                break
            left_s = until_s - self._now_s()
            if left_s <= 0.0:
                break
            due_in_s = self._line.due_in_s()
            self._crew.wait(left_s if due_in_s is None else min(left_s, due_in_s))
        self._crew.away()
        return self._lend(table) if self._lent else None

    def reply(self, action: NDArray[Any]) -> None:
        """Hands the actions to the workers; returns at once.

        Raises:
            PeerLost: the pool was closed.
            RuntimeError: nothing was received since the last reply.
            ValueError: wrong count or dtype, or an action outside the space; nothing was sent.
        """
        table = self._open_table()
        if not self._lent:
            raise RuntimeError("reply came twice: receive a batch first")
        check_action(action, self._lent_count, self.spec.action_space)
        table.all.action[self._lent_rows] = action
        asked: dict[int, list[bytes]] = {}
        for block in self._lent:
            worker, group = self._whose[block]
            asked.setdefault(worker, []).append(GROUP.pack(group))
        for worker, numbers in asked.items():
            self._crew.ask(worker, b"".join(numbers), len(numbers))
        self._lent = []

    def close(self) -> None:
        """Ends the workers and gives the memory back; a second call does nothing."""
        if self._table is None:
            return
        # Whoever still holds a batch keeps the mapping alive; nothing else does.
        self._table = None
        self._stretches.clear()
        self._crew.close()
        for fd in (self._block_fd, self._ready_fd, self._ready_end):
            os.close(fd)

    def _collect(self) -> None:
        """Puts the groups that have come back into the line."""
        try:
            data = os.read(self._ready_fd, _PIPE_NBYTES)
        except BlockingIOError:
            return
        blocks = []
        for worker, group, generation in RECORD.iter_unpack(data):
            if generation == self._crew.generation(worker):  # else a dead worker's
                self._crew.returned(worker)
                blocks.append(self._block_at[worker, group])
        self._line.add(blocks)

    def _lend(self, table: Table) -> EnvStep:
        spans = [self._blocks[block] for block in self._lent]
        self._lent_rows, step = lend(table.all, spans, self._stretches, self.spec)
        self._lent_count = len(step.env_id)
        return step

    def _start_worker(self, worker: int, generation: int) -> WorkerProcess:
        settings = {
            "env": self._recipe.env,
            "settings": self._recipe.settings,
            "seed": self._recipe.seed,
            "first_env": self._recipe.first_env,
            "draws_apart": self._recipe.draws_apart,
            "batch_size": self.max_batch,
            "num_envs": self.num_envs,
            "groups": self._groups[worker],
            "worker": worker,
            "generation": generation,
            "block_fd": self._block_fd,
            "nbytes": layout(self.spec, self.num_envs).nbytes,
            "spec": describe(self.spec),
            "ready_fd": self._ready_end,
        }
        return WorkerProcess(
            WORKER_MODULE,
            settings,
            name=f"headrace worker {worker}",
            pass_fds=(self._block_fd, self._ready_end),
        )

    def _drop(self, worker: int) -> None:
        self._collect()  # what it gave before it died is gone too
        self._line.drop([block for block, place in enumerate(self._whose) if place[0] == worker])

    def _label(self, worker: int) -> str:
        before = self._recipe.first_env
        first, end = self._groups[worker][0][0] + before, self._groups[worker][-1][1] + before
        return f"worker {worker} (environments {first}..{end - 1} of {self._recipe.env})"

    def _open_table(self) -> Table:
        if self._table is None:
            raise PeerLost("the pool is closed")
        return self._table
