"""Who is started again and when, by a clock of the test's own; no process is started here."""

import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from headrace.errors import PeerLost
from headrace.pools.crew import FIRST_PAUSE_S, LOOK_S, Crew
from headrace.pools.processes import WorkerProcess
from headrace.pools.settings import WorkerConfig


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Dummy:
    """A worker that does what the test says."""

    def __init__(self, worker: int, generation: int) -> None:
        self.worker, self.generation = worker, generation
        self.status_fd, self._status_end = os.pipe()
        self.output_fd, self._output_end = os.pipe()
        self.sent: list[bytes] = []
        self.cause: str | None = None
        self.answers_kill = True
        self.lines: list[str] = []
        self.lines_printed = 0
        self.notes: list[dict[str, Any]] = []
        self.closed = False

    def send(self, data: bytes) -> None:
        self.sent.append(data)

    def messages(self) -> list[dict[str, Any]]:
        notes, self.notes = self.notes, []
        return notes

    def printed(self) -> list[str]:
        lines, self.lines = self.lines, []
        self.lines_printed += len(lines)
        return lines

    def death(self) -> str | None:
        return self.cause

    def stack(self) -> str:
        return "game.py, line 3 in step"

    def kill(self, cause: str) -> None:
        if self.answers_kill:
            self.cause = cause

    def hang_up(self) -> None:
        """Closing is enough."""

    def close(self, timeout_s: float = 0.0) -> None:
        if not self.closed:
            self.closed = True
            for fd in (self.status_fd, self._status_end, self.output_fd, self._output_end):
                os.close(fd)


class Stage:
    """A crew of one worker with two groups, and what it said."""

    def __init__(self, config: WorkerConfig) -> None:
        self.clock = Clock()
        self.started: list[Dummy] = []
        self.dropped: list[int] = []
        self.said: list[str] = []
        self.crew = Crew(
            self._start,
            ["worker 0"],
            groups=2,
            config=config,
            on_death=self.dropped.append,
            on_message=self.said.append,
            now_s=self.clock,
        )

    def _start(self, worker: int, generation: int) -> WorkerProcess:
        self.started.append(Dummy(worker, generation))
        return cast(WorkerProcess, self.started[-1])

    @property
    def worker(self) -> Dummy:
        return self.started[-1]

    def get_ready(self, after_s: float = 1.0) -> None:
        self.pass_s(after_s)
        for _ in range(2):
            self.crew.returned(0)

    def pass_s(self, seconds: float) -> None:
        self.clock.now_s += seconds

    def look(self) -> None:
        self.pass_s(LOOK_S)
        self.crew.look()

    def die(self, cause: str = "killed") -> None:
        self.worker.cause = cause
        self.look()


@pytest.fixture
def stage_of() -> Iterator[Callable[..., Stage]]:
    stages: list[Stage] = []

    def make(**settings: Any) -> Stage:
        stages.append(Stage(WorkerConfig(**settings)))
        return stages[-1]

    yield make
    for stage in stages:
        stage.crew.close()


Make = Callable[..., Stage]


def test_the_first_death_is_mended_at_once(stage_of: Make) -> None:
    stage = stage_of()
    stage.get_ready()
    stage.die("ValueError: moon")
    assert stage.dropped == [0]
    assert stage.said == ["worker 0 died: ValueError: moon; its environments start anew"]
    assert [dummy.generation for dummy in stage.started] == [0, 1]
    assert stage.crew.generation(0) == 1
    assert stage.crew.deaths == 1
    assert stage.started[0].closed


def test_pauses_grow_and_nobody_waits_for_them(stage_of: Make) -> None:
    stage = stage_of(max_worker_deaths=9)
    pauses = []
    for _ in range(4):
        stage.die()
        pauses.append(0.0)
        count = len(stage.started)
        while stage.worker.closed:
            assert stage.crew.pids() == []
            stage.pass_s(FIRST_PAUSE_S / 4)
            pauses[-1] += FIRST_PAUSE_S / 4
            stage.crew.look()
        assert len(stage.started) <= count + 1
    assert pauses[0] == 0.0
    assert FIRST_PAUSE_S <= pauses[1] < pauses[2] < pauses[3]


def test_too_many_deaths_in_a_row_end_the_run_with_the_first_cause(stage_of: Make) -> None:
    stage = stage_of(max_worker_deaths=3)
    stage.die("the first")
    stage.die("the second")
    stage.pass_s(60.0)
    stage.crew.look()
    with pytest.raises(PeerLost, match=r"worker 0 died 3 times in a row, first: the first"):
        stage.die("the third")


def test_a_long_healthy_life_ends_the_row(stage_of: Make) -> None:
    stage = stage_of(max_worker_deaths=2)
    for _ in range(5):
        stage.get_ready(after_s=1.0)
        stage.pass_s(10.0)
        stage.die()
    assert stage.crew.deaths == 5
    stage.get_ready(after_s=1.0)
    stage.pass_s(9.0)
    with pytest.raises(PeerLost, match="2 times in a row"):
        stage.die()


def test_a_worker_that_never_got_ready_was_never_healthy(stage_of: Make) -> None:
    stage = stage_of(max_worker_deaths=2, start_timeout_s=1e6)
    stage.pass_s(1e4)
    stage.die()
    stage.pass_s(1e4)
    with pytest.raises(PeerLost):
        stage.die()


def test_a_worker_that_gives_no_step_is_killed_where_it_hangs(stage_of: Make) -> None:
    stage = stage_of(step_timeout_s=5.0)
    stage.get_ready()
    stage.pass_s(100.0)  # it has nothing to do
    stage.look()
    stage.crew.ask(0, b"01", 2)
    stage.pass_s(4.0)
    stage.crew.returned(0)  # a sign of progress
    stage.pass_s(4.0)
    stage.look()
    assert stage.crew.deaths == 0
    stage.pass_s(1.0)
    stage.look()
    assert stage.crew.deaths == 0  # killed, and seen dead at the next look
    stage.look()
    assert stage.said == [
        "worker 0 died: gave no step after 5 s and was killed: game.py, line 3 in step; "
        "its environments start anew"
    ]


def test_a_worker_that_survives_its_kill_for_a_while_is_not_replaced(stage_of: Make) -> None:
    stage = stage_of(step_timeout_s=5.0)
    stage.get_ready()
    stage.worker.answers_kill = False
    stage.crew.ask(0, b"0", 1)
    for _ in range(3):  # it may still write into its rows
        stage.pass_s(6.0)
        stage.look()
    assert len(stage.started) == 1
    stage.die()
    assert len(stage.started) == 2


def test_a_start_has_a_deadline_of_its_own(stage_of: Make) -> None:
    stage = stage_of(step_timeout_s=1.0, start_timeout_s=10.0)
    stage.pass_s(9.0)
    stage.crew.returned(0)  # one group is reset, the other is not
    stage.look()
    assert stage.worker.cause is None
    stage.pass_s(2.0)
    stage.look()
    assert str(stage.worker.cause).startswith("was not ready after 10 s")


def test_what_passes_while_nobody_listens_is_no_silence(stage_of: Make) -> None:
    stage = stage_of(step_timeout_s=5.0)
    stage.get_ready()
    stage.crew.ask(0, b"0", 1)
    stage.crew.away()
    stage.pass_s(1000.0)
    stage.crew.back()
    stage.look()
    assert stage.worker.cause is None
    stage.pass_s(6.0)
    stage.look()
    assert stage.worker.cause is not None


def test_the_dead_are_not_asked(stage_of: Make) -> None:
    stage = stage_of()
    stage.die()
    stage.die()
    before = len(stage.worker.sent)
    stage.crew.ask(0, b"0", 1)
    assert len(stage.worker.sent) == before


def test_three_printed_lines_are_told_and_all_are_counted(stage_of: Make) -> None:
    stage = stage_of()
    stage.worker.lines = ["a", "b"]
    stage.look()
    stage.worker.lines = ["c", "d", "e"]
    stage.look()
    stage.die()
    stage.worker.lines = ["f"]
    stage.look()
    assert [line for line in stage.said if "printed" in line] == [
        "worker 0 printed: a",
        "worker 0 printed: b",
        "worker 0 printed: c (from now on its lines are only counted)",
    ]
    assert stage.crew.lines_printed == 6


def test_notes_are_passed_on(stage_of: Make) -> None:
    stage = stage_of()
    stage.worker.notes = [{"note": "an info was left out"}]
    stage.look()
    assert stage.said == ["worker 0: an info was left out"]
