"""The first of several learners looks after the others, which are processes of this machine.

```
first learner: the process that the user started     learner 1, 2, ...: run/learner_rank.py
run directory, reports, checkpoints, roles           a share of the environments, their server
        │  "go", or the end of the pipe ────────────────────▶ │
        │ ◀─ "built", episodes that ended, notes, why it died │
        └───── learner/group.py: meetings, gradients ─────────┘
```
Gradients and counts cross in the group; what is only told, through the pipes of `WorkerProcess`. A
learner that dies, or is silent for too long, ends the run with the cause. None outlives the first.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from headrace.config import RunConfig, to_dict
from headrace.errors import DeadlineExceeded, PeerLost
from headrace.learner.group import ExchangeFailed, Group, connect
from headrace.pools.memory import anonymous_block
from headrace.pools.processes import WorkerProcess
from headrace.run.build import Parts
from headrace.run.meeting import share_learning, spread_state
from headrace.run.saving import Before
from headrace.run.seeds import Use, derived_seed
from headrace.run.share import learner_devices, uncompiled

MODULE = "headrace.run.learner_rank"
"""The program of every learner but the first."""

_LOOK_S = 0.05
_DEATH_S = 10.0  # until a process whose connection broke is known to be dead
_CLOSE_S = 3.0  # for all of them to leave by themselves
_END_S = 10.0  # for all of them to tell what they have left and to go
_MOST_LINES = 20  # printed by each learner that are told

OnEpisodes = Callable[[list[float], list[int], list[dict[str, float]]], None]
"""Raw returns, lengths in agent steps, numbers of the last `info`."""


def exchange_timeout_s(config: RunConfig) -> float:
    """Returns how long a learner may keep the others waiting: as long as two steps may take."""
    return 2.0 * config.workers.step_timeout_s


def draws_seed(config: RunConfig, resume_count: int) -> int:
    """Returns where the seeds of what learners draw in updates come from, in one session."""
    return derived_seed(config.seed, Use.SESSION_UPDATES, resume_count)


class OtherLearners:
    """All learners but the first, seen from it. For its main thread."""

    def __init__(
        self,
        config: RunConfig,
        run: Path,
        before: Before,
        *,
        trust_code: bool,
        on_message: Callable[[str], None],
        on_episodes: OnEpisodes,
    ) -> None:
        """Starts them; returns before they are ready.

        Args:
            config: The run's settings, whose `learner_devices` are several.
            run: The run directory, for what is said when one dies.
            before: Counters of the run when this session began.
            trust_code: Whether to import code that the run names from outside headrace.
            on_message: Told what is worth a line.
            on_episodes: Told of their episodes.

        Raises:
            ConfigError: there is too little memory.
        """
        self.devices = learner_devices(config)
        self._config, self._run = config, run
        self._resume_count = before.resume_count
        self._on_message, self._on_episodes = on_message, on_episodes
        self._calls_fd, self._calls = anonymous_block(8 * len(self.devices))
        self._folder = Path(tempfile.mkdtemp(prefix="headrace-learners-"))
        self._built: set[int] = set()
        self._ending = False
        self._told = dict.fromkeys(range(1, len(self.devices)), 0)
        settings = {
            "config": to_dict(config),
            "count": len(self.devices),
            "folder": str(self._folder),
            "calls_fd": self._calls_fd,
            "resume_count": before.resume_count,
            "agent_steps": before.agent_steps,
            "updates": before.updates,
            "samples": before.samples,
            "trust_code": trust_code,
        }
        self._processes: dict[int, _Telling] = {}
        try:
            for rank in self._told:
                self._processes[rank] = _Telling(
                    partial(self._take, rank), {**settings, "rank": rank}
                )
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> dict[int, int]:
        """Process id of each, by rank."""
        return {rank: process.pid for rank, process in self._processes.items()}

    def connect(self, parts: Parts) -> Group:
        """Waits until all are built, connects them, and gives them the first one's state.

        Raises:
            PeerLost: one has died.
            DeadlineExceeded: one was not built in time.
        """
        until_s = time.monotonic() + self._config.workers.start_timeout_s
        while len(self._built) < len(self._processes):
            self.attend()
            if time.monotonic() > until_s:
                late = ", ".join(map(self._label, sorted(set(self._told) - self._built)))
                raise DeadlineExceeded(
                    f"{late} did not start within {self._config.workers.start_timeout_s:g} s: "
                    "raise --start-timeout-s, or name fewer --learner-devices"
                )
            time.sleep(_LOOK_S)
        for process in self._processes.values():
            process.send(b"go\n")
        with self.blamed():
            group = connect(
                self._folder,
                rank=0,
                devices=self.devices,
                timeout_s=exchange_timeout_s(self._config),
                calls=calls_of(self._calls),
                on_wait=self.attend,
            )
            spread_state(parts, group, seed=draws_seed(self._config, self._resume_count))
        # All have found each other: nothing is left on the disk, however this process ends.
        shutil.rmtree(self._folder, ignore_errors=True)
        share_learning(parts, group)
        return group

    def attend(self) -> None:
        """Hears what they have to say; never waits.

        Raises:
            PeerLost: one has died; with the cause.
        """
        for rank, process in self._processes.items():
            self._hear(rank, process)
            # A process that says why it dies may take seconds to be gone.
            cause = process.death() or process.account
            if cause is not None and not self._ending:
                raise self._lost(rank, f"died: {cause}")

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Finds out who is to blame for an exchange that fails within the block.

        Raises:
            PeerLost: names the learner and the cause.
        """
        try:
            yield
        except ExchangeFailed as error:
            until_s = time.monotonic() + _DEATH_S
            while error.late is None and time.monotonic() < until_s:
                self.attend()
                time.sleep(_LOOK_S)
            if error.late is None:
                raise
            raise self._lost(*self._silent(error.late)) from error

    def finish(self) -> None:
        """Hears their last episodes, and waits until they have gone; at most 10 s."""
        self._ending = True
        until_s = time.monotonic() + _END_S
        while time.monotonic() < until_s:
            self.attend()
            if all(process.death() is not None for process in self._processes.values()):
                self.attend()
                break
            time.sleep(_LOOK_S)
        for rank, process in self._processes.items():
            if process.account is not None:  # the run is whole without it, but nobody else says it
                self._on_message(f"{self._label(rank)} died at the end: {process.account}")

    def close(self) -> None:
        """Ends them, whatever they are at; a second call does nothing."""
        for process in self._processes.values():
            process.hang_up()
        until_s = time.monotonic() + _CLOSE_S
        for process in self._processes.values():
            process.close(max(0.0, until_s - time.monotonic()))
        self._processes.clear()
        if self._calls_fd >= 0:
            os.close(self._calls_fd)
            self._calls_fd = -1
        shutil.rmtree(self._folder, ignore_errors=True)

    def _hear(self, rank: int, process: WorkerProcess) -> None:
        process.messages()
        for line in process.printed():
            self._told[rank] += 1
            if self._told[rank] <= _MOST_LINES:
                last = " (its further lines are left out)" * (self._told[rank] == _MOST_LINES)
                self._on_message(f"learner {rank} printed: {line}{last}")

    def _take(self, rank: int, message: Mapping[str, Any]) -> None:
        if "built" in message:
            self._built.add(rank)
        elif "note" in message:
            self._on_message(f"learner {rank}: {message['note']}")
        elif "episodes" in message:
            self._on_episodes(*message["episodes"])

    def _silent(self, late: Sequence[int]) -> tuple[int, str]:
        """Finds who keeps the others waiting, and kills it; what it does goes with the cause."""
        stacks = {rank: self._processes[rank].stack() for rank in late or self._processes}
        # Who does not even say where it is has been stopped, or hangs in the kernel.
        rank = min(stacks, key=lambda rank: bool(stacks[rank]))
        where = f"at {stacks[rank]}" if stacks[rank] else "it answers no signal"
        silent = f"kept the others waiting for {exchange_timeout_s(self._config):g} s ({where})"
        self._processes[rank].kill(silent)
        return rank, silent

    def _label(self, rank: int) -> str:
        return f"learner {rank} on {self.devices[rank]}"

    def _lost(self, rank: int, what: str) -> PeerLost:
        return PeerLost(
            f"{self._label(rank)} {what}; the run ends, go on from its newest checkpoint with "
            f"`headrace train --resume {self._run}`"
        )


class _Telling(WorkerProcess):
    """A learner's process, whose messages are heard whoever asks for them."""

    def __init__(
        self, hear: Callable[[Mapping[str, Any]], None], settings: Mapping[str, Any]
    ) -> None:
        super().__init__(
            MODULE,
            settings,
            name=f"headrace learner {settings['rank']}",
            pass_fds=(settings["calls_fd"],),
        )
        self._hear_message = hear
        self.account: str | None = None
        """Its own account of why it dies, as soon as that has come."""

    def messages(self) -> list[dict[str, Any]]:
        """Hands on all but its account of why it dies, which is returned."""
        said = super().messages()
        for message in said:
            if "error" in message:
                self.account = message["error"]
            else:
                self._hear_message(message)
        return [message for message in said if "error" in message]


def calls_of(block: mmap.mmap) -> Any:
    """Returns the counts of exchanges, one for each learner, in memory that all share."""
    return np.frombuffer(block, np.int64)


@contextmanager
def other_learners(
    config: RunConfig,
    run: Path,
    before: Before,
    *,
    trust_code: bool,
    told: Callable[[str], None],
    add: OnEpisodes,
) -> Iterator[OtherLearners | None]:
    """Starts all learners but the first for the block; None where there are not several."""
    if notice := uncompiled(config):
        told(notice)
    if len(learner_devices(config)) == 1:
        yield None
        return
    others = OtherLearners(
        config, run, before, trust_code=trust_code, on_message=told, on_episodes=add
    )
    try:
        yield others
    finally:
        others.close()
