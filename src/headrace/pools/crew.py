"""The workers of a pool, supervised: which one died or hangs, why, and when it starts again."""

from __future__ import annotations

import math
import re
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace.errors import PeerLost
from headrace.pools.processes import WorkerProcess
from headrace.pools.settings import WorkerConfig

LOOK_S = 0.25
"""Seconds between two looks at workers that say nothing; pipes that do are read at once."""
HEALTHY_STARTS = 10.0
"""A life is long when it lasts so many times as long as its start did: then starting again costs
less than a tenth of the worker's time, and a run can go on like that."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 10.0
"""Before the third start in a row, and before any; the second start comes at once."""
LINES_TOLD = 3
"""Lines that a worker may print on the user's screen; the others are counted."""


@dataclass(slots=True)
class Member:
    """One worker, in all its lives."""

    index: int
    label: str  # for messages: the worker and its environments
    groups: int
    process: WorkerProcess | None = None
    generation: int = -1
    busy: int = 0  # groups that it has not given back
    resets_left: int = 0  # of its start
    since_s: float = 0.0  # when the silence began: its start, else the last sign of progress
    start_s: float = math.inf  # how long its start took
    ready_s: float = 0.0  # when that was over
    given_up: bool = False  # killed as hanging, and not yet dead
    restart_s: float = 0.0
    deaths: int = 0  # in a row
    first_cause: str = ""
    lines_told: int = 0


class Crew:
    """Starts workers, and starts them again. For one thread.

    Deadlines count only while the owner listens: between `back` and `away`.
    """

    def __init__(
        self,
        start: Callable[[int, int], WorkerProcess],
        labels: Sequence[str],
        *,
        groups: int | Sequence[int],
        config: WorkerConfig,
        on_death: Callable[[int], None],
        on_message: Callable[[str], None],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts all workers; returns before they are ready.

        Args:
            start: starts the process of worker i in generation g.
            labels: what messages call each worker.
            groups: groups of environments of each, one number if all have as many; each group comes
                back once when it is reset.
            config: deadlines, and how many deaths are too many.
            on_death: told the worker, as soon as it is certainly dead.
            on_message: told what is worth a line.
            now_s: the clock.
        """
        self.deaths = 0
        """Of all workers, ever."""
        self.lines_printed = 0
        """By all workers, ever."""
        self._start = start
        self._config = config
        self._on_death = on_death
        self._on_message = on_message
        self._now_s = now_s
        self._poller = select.poll()
        self._noted: set[str] = set()  # what workers noticed, without its numbers
        self._pipes: set[int] = set()  # of workers, in the poller
        self._outputs: set[int] = set()  # of these, what they print
        self._next_look_s = 0.0
        self._away_s = now_s()
        counts = [groups] * len(labels) if isinstance(groups, int) else groups
        self._members = [
            Member(index, label, count)
            for index, (label, count) in enumerate(zip(labels, counts, strict=True))
        ]
        for member in self._members:
            self._begin(member)

    def watch(self, fd: int) -> None:
        """Lets `wait` end when there is something to read from `fd`, too."""
        self._poller.register(fd, select.POLLIN)

    def back(self) -> None:
        """The owner listens again: what passed meanwhile is nobody's silence."""
        gap_s = self._now_s() - self._away_s
        if gap_s < LOOK_S:
            return
        for member in self._members:
            member.since_s += gap_s

    def away(self) -> None:
        """The owner has something else to do."""
        self._away_s = self._now_s()

    def generation(self, worker: int) -> int:
        """Number of starts before the present one."""
        return self._members[worker].generation

    def pids(self) -> list[int]:
        """Process ids of the workers that live."""
        return [member.process.pid for member in self._members if member.process is not None]

    def ask(self, worker: int, data: bytes, groups: int) -> None:
        """Sends a worker so many groups' actions; one that is dead does not mind."""
        member = self._members[worker]
        if member.process is None:
            return
        if not member.busy:
            member.since_s = self._now_s()
        member.busy += groups
        member.process.send(data)

    def returned(self, worker: int) -> None:
        """A group came back."""
        member = self._members[worker]
        member.busy -= 1
        if not member.resets_left:
            member.since_s = self._now_s()
            return
        member.resets_left -= 1
        if not member.resets_left:
            member.ready_s = self._now_s()
            member.start_s = member.ready_s - member.since_s
            member.since_s = member.ready_s

    def wait(self, timeout_s: float) -> None:
        """Waits until a pipe has something, a look is due, or `timeout_s` is over."""
        left_s = min(timeout_s, self._next_look_s - self._now_s())
        for fd, event in self._poller.poll(max(0.0, left_s) * 1000.0):
            if fd not in self._pipes:
                continue
            self._next_look_s = 0.0
            if not event & select.POLLIN and fd in self._outputs:
                self._poller.unregister(fd)  # it closed its output, which is no crime
                self._pipes.discard(fd)

    def look(self) -> None:
        """Relays, buries and restarts, if it is time to look.

        Raises:
            PeerLost: a worker died too often in a row.
        """
        now_s = self._now_s()
        if now_s < self._next_look_s:
            return
        self._next_look_s = now_s + LOOK_S
        for member in self._members:
            if member.process is not None:
                self._attend(member, member.process)
            if member.process is None:
                if now_s >= member.restart_s:
                    self._begin(member)
                else:
                    self._next_look_s = min(self._next_look_s, member.restart_s)

    def close(self) -> None:
        """Ends all workers; a second call does nothing."""
        processes = [member.process for member in self._members if member.process is not None]
        for process in processes:
            process.hang_up()
        until_s = time.monotonic() + 5.0  # for all together
        for process in processes:
            process.close(max(0.0, until_s - time.monotonic()))
        for member in self._members:
            member.process = None

    def _begin(self, member: Member) -> None:
        member.generation += 1
        member.process = self._start(member.index, member.generation)
        member.busy = member.resets_left = member.groups
        member.since_s = self._now_s()
        member.start_s = math.inf
        member.given_up = False
        self._outputs.add(member.process.output_fd)
        for fd in (member.process.status_fd, member.process.output_fd):
            self._pipes.add(fd)
            self._poller.register(fd, select.POLLIN)

    def _attend(self, member: Member, process: WorkerProcess) -> None:
        for message in process.messages():
            note = message.get("note", "")
            topic = re.sub(r"[-+.\d]+", "#", note)
            if note and topic not in self._noted:  # 64 environments have the same to say
                self._noted.add(topic)
                self._on_message(f"{member.label}: {note}")
        self._relay(member, process)
        cause = process.death()
        if cause is not None:
            self._bury(member, process, cause)
        elif not member.given_up:
            self._judge(member, process)

    def _relay(self, member: Member, process: WorkerProcess) -> None:
        before = process.lines_printed
        lines = [line for line in process.printed() if line.strip()]
        self.lines_printed += process.lines_printed - before
        for line in lines[: LINES_TOLD - member.lines_told]:
            member.lines_told += 1
            last = member.lines_told == LINES_TOLD
            rest = " (from now on its lines are only counted)" if last else ""
            self._on_message(f"{member.label} printed: {line}{rest}")

    def _judge(self, member: Member, process: WorkerProcess) -> None:
        limit_s = (
            self._config.start_timeout_s if member.resets_left else self._config.step_timeout_s
        )
        if not member.busy or self._now_s() - member.since_s <= limit_s:
            return
        what = "was not ready" if member.resets_left else "gave no step"
        where = process.stack() or "somebody may have stopped it"
        process.kill(f"{what} after {limit_s:g} s and was killed: {where}")
        member.given_up = True

    def _bury(self, member: Member, process: WorkerProcess, cause: str) -> None:
        now_s = self._now_s()
        self._outputs.discard(process.output_fd)
        for fd in self._pipes & {process.status_fd, process.output_fd}:
            self._pipes.discard(fd)
            self._poller.unregister(fd)
        process.close()
        member.process = None
        self.deaths += 1
        healthy = now_s - member.ready_s > HEALTHY_STARTS * member.start_s
        member.deaths = 1 if healthy else member.deaths + 1
        if member.deaths == 1:
            member.first_cause = cause
        self._on_death(member.index)
        if member.deaths >= self._config.max_worker_deaths:
            times = "" if member.deaths == 1 else f" {member.deaths} times in a row, first"
            raise PeerLost(f"{member.label} died{times}: {member.first_cause}")
        pause_s = 0.0 if member.deaths == 1 else FIRST_PAUSE_S * 2.0 ** (member.deaths - 2)
        member.restart_s = now_s + min(pause_s, LONGEST_PAUSE_S)
        self._on_message(f"{member.label} died: {cause}; its environments start anew")
