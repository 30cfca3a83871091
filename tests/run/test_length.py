"""Where a run ends: within a batch of environments of its frames, or with its clock."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headrace import TrainResult, train
from headrace.config import from_dict, merged
from headrace.length import Length
from headrace.presets import find
from headrace.run.api import prepare, start
from headrace.run.local import Hooks
from headrace.run.meeting import Meeting
from headrace.telemetry.record import read_metrics
from tests.run.test_local import stop_after

SMALL: dict[str, Any] = {
    "device": "cpu",
    "precision": "float32",
    "tensorboard": False,
    "server": {"num_envs": 8},
}
PPO = {"algorithm": "ppo", "learning": {"unroll_steps": 16, "batch_unrolls": 8}}
FAST = {"env": "catch", "network": {"network": "mlp"}}
RUNS: dict[str, dict[str, Any]] = {
    "impala": FAST,
    "impala-in-turns": {**FAST, "turns": "on"},
    "impala-in-torch": {**FAST, "pool": "device"},
    "impala-in-workers": {**FAST, "inference": "worker", "workers": {"num_workers": 2}},
    "ppo": {**FAST, **PPO},
    "ppo-overlapped": {**FAST, **PPO, "turns": "off"},
    "r2d2": {
        **FAST,
        "algorithm": "r2d2",
        "learning": {"replay": {"replay_capacity": 400, "replay_min": 8}},
    },
    "sac": {
        "env": "pointmass",
        "algorithm": "sac",
        "network": {"hidden_sizes": [8]},
        "learning": {
            "batch_unrolls": 32,
            "updates_per_call": 8,
            "replay": {"replay_capacity": 4000, "replay_min": 64},
        },
    },
}


class Clock:
    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_within_a_batch_of_environments(tmp_path: Path, name: str) -> None:
    settings = {**SMALL, **RUNS[name], "out": str(tmp_path / "run"), "total_frames": 1501}
    assert train(from_dict(settings)).finished
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert 1501 <= last["env_frames"] < 1501 + 8
    assert last["agent_steps"] == last["env_frames"]


@pytest.mark.net
@pytest.mark.parametrize("settings", [{}, PPO], ids=["impala", "ppo"])
def test_so_do_several_learners(tmp_path: Path, settings: dict[str, Any]) -> None:
    several = {"learner_devices": "cpu,cpu", "out": str(tmp_path / "run"), "total_frames": 1501}
    result = train(from_dict({**SMALL, **FAST, **settings, **several}))
    assert result.finished
    assert 1501 <= result.metrics["env_frames"] < 1501 + 8


def clocked(
    out: Path, clock: Clock, *, stop: int | None = None, resume: bool = False, **settings: Any
) -> tuple[TrainResult, list[float]]:
    """Trains while each update takes a second; returns what each had for a learning rate."""
    rates = []
    until = stop_after(stop) if stop else lambda *_: None

    def on_update(version: int, metrics: Any) -> None:
        rates.append(float(metrics["learning_rate"]))
        clock.now_s += 1.0
        until(version, metrics)

    base = merged(find("catch").values, {**SMALL, "env": "catch", "out": str(out), "turns": "on"})
    learning = {
        "unroll_steps": 5,
        "batch_unrolls": 8,
        "optimizer": {"learning_rate": 0.03, "learning_rate_schedule": "linear"},
    }
    config = from_dict(merged(merged(base, {"learning": learning}), settings))
    prepared = prepare(resume=out, changes=settings) if resume else prepare(config)
    hooks = Hooks(lambda _: None, on_update, lambda _: None, lambda _: None)
    return start(prepared, hooks, clock_s=clock), rates


@pytest.mark.parametrize("turns", ["on", "off"])
def test_a_run_and_its_schedule_end_with_the_clock(tmp_path: Path, turns: str) -> None:
    result, rates = clocked(tmp_path / "run", Clock(), total_minutes=0.5, turns=turns)
    assert result.finished
    assert result.metrics["updates"] == 30
    assert result.metrics["elapsed_s"] == 30.0
    # Of the first update it is the frames that are ahead, by a trifle.
    assert rates == pytest.approx([0.03 * (1 - update / 30) for update in range(30)], abs=3e-5)


def test_what_came_before_the_first_update_counts(tmp_path: Path) -> None:
    result, rates = clocked(tmp_path / "run", Clock(20.0), total_minutes=0.5)
    assert result.metrics["updates"] == 10
    assert rates[0] == pytest.approx(0.03 / 3)


def test_frames_end_a_run_whose_clock_goes_on(tmp_path: Path) -> None:
    result, rates = clocked(tmp_path / "run", Clock(), total_minutes=60.0, total_frames=400)
    assert result.finished
    assert 400 <= result.metrics["env_frames"] < 408
    assert rates[5] < 0.03 / 2


def test_a_resumed_run_has_the_minutes_that_are_left(tmp_path: Path) -> None:
    out = tmp_path / "run"
    first, _ = clocked(out, Clock(), total_minutes=0.5, stop=12)
    assert not first.finished
    assert first.metrics["elapsed_s"] == 12.0
    second, rates = clocked(out, Clock(3.0), resume=True)  # its start took 3 s
    assert second.finished
    assert rates[0] == pytest.approx(0.03 * 0.5)
    assert second.metrics["updates"] == 12 + 15
    assert second.metrics["elapsed_s"] == 30.0
    third, rates = clocked(out, Clock(), resume=True, total_minutes=1.0, schedule_minutes=1.0)
    assert rates[0] == pytest.approx(0.03 * 0.5)
    assert third.metrics["elapsed_s"] == 60.0
    _, rates = clocked(out, Clock(), resume=True, total_minutes=1.5)
    assert set(rates) == {0.0}, "the schedule has come to its end, and stays there"
    fourth, _ = clocked(out, Clock(), resume=True, total_minutes=None, total_frames=4500)
    assert fourth.metrics["env_frames"] >= 4500


def test_a_longer_run_keeps_its_schedules_unless_they_are_typed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    clocked(out, Clock(), total_frames=2000, stop=20)
    said: list[str] = []

    def rate(**changes: Any) -> float:
        """The first learning rate of a session that ends at once."""
        prepared = prepare(resume=out, changes=changes)
        rates = []

        def on_update(_: int, metrics: Any) -> None:
            rates.append(float(metrics["learning_rate"]))
            os.kill(os.getpid(), signal.SIGTERM)

        said.clear()
        start(prepared, Hooks(lambda _: None, on_update, lambda _: None, said.append))
        return rates[0]

    left = 1 - 0.03 / 0.03 * 20 * 40 / 2000  # of 50 updates 20 are done
    assert rate(total_frames=8000) == pytest.approx(0.03 * left, rel=0.1)
    [line] = [text for text in said if "schedules" in text]
    assert "end at 2 000 frames, as before" in line
    assert "--schedule-frames 8000" in line
    assert rate(schedule_frames=8000) == pytest.approx(0.03 * (1 - 0.1), rel=0.05)
    [line] = [text for text in said if "schedules" in text]
    assert "schedules end at 8 000 frames now, not at 2 000 frames" in line
    assert rate() == pytest.approx(0.03 * (1 - 0.1), rel=0.05)
    assert not [text for text in said if "schedules end at 8 000 frames now" in text]
    # A clock that comes later ends the run, and no schedule.
    assert rate(total_minutes=60.0) == pytest.approx(0.03 * (1 - 0.1), rel=0.05)
    assert not [text for text in said if "minutes" in text]


def test_a_run_that_is_complete_says_so_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    first, _ = clocked(out, Clock(), total_frames=400)
    metrics = (out / "metrics.jsonl").read_bytes()
    checkpoints = sorted((out / "checkpoints").iterdir())
    said: list[str] = []
    nothing = Hooks(lambda _: None, lambda *_: None, lambda _: None, said.append)
    again = start(prepare(resume=out), nothing)
    assert again.finished
    assert again.metrics["env_frames"] == first.metrics["env_frames"]
    assert (out / "metrics.jsonl").read_bytes() == metrics
    assert sorted((out / "checkpoints").iterdir()) == checkpoints
    [line] = said
    assert "this run is complete" in line
    flag = line.partition("say ")[2].partition(" to go on")[0].split()
    assert flag[0] == "--total-frames"
    more = start(prepare(resume=out, changes={"total_frames": int(flag[1])}), nothing)
    assert more.metrics["env_frames"] >= int(flag[1])


def meetings(rank: int, rows: Sequence[list[int]], *, total_minutes: float | None) -> Meeting:
    """Returns a learner's meetings, at the first of which all say `rows`."""
    group: Any = SimpleNamespace(rank=rank, count=len(rows), meet=lambda _: rows)
    parts: Any = SimpleNamespace(
        spec=SimpleNamespace(action_repeat=4),
        source=SimpleNamespace(agent_steps=rows[rank][3]),
        dropped_unrolls=0,
        queue=type("Queue", (list,), {"stale": 0})(),
        worker_deaths=0,
    )
    length = Length(1000, total_minutes)
    config: Any = SimpleNamespace(length=length, horizon=length, lockstep=False)
    return Meeting(group, parts, config=config, agent_steps=0)


def test_all_learners_have_the_first_ones_clock() -> None:
    rows = [[1, 0, 45_123, 10, 0, 0, 0, 0], [1, 0, 0, 30, 0, 0, 0, 0]]
    seen = set()
    for rank in range(2):
        meeting = meetings(rank, rows, total_minutes=1.0)
        assert meeting.meet(ready=True, stop=False, elapsed_s=45.1234 if rank == 0 else 0.0)
        seen.add(meeting.progress)
    assert seen == {45.123 / 60}


def test_learners_make_equal_parts_of_what_is_left() -> None:
    """Of 250 agent steps 130 were made, so that each makes 60 more."""
    rows = [[0, 0, 0, 100, 0, 0, 0, 0], [0, 0, 0, 30, 0, 0, 0, 0]]
    meeting = meetings(1, rows, total_minutes=None)
    assert not meeting.enough()
    meeting.meet(ready=False, stop=False, elapsed_s=0.0)
    source: Any = meeting._parts.source
    source.agent_steps = 89
    assert not meeting.enough()
    source.agent_steps = 90
    assert meeting.enough()
    assert meeting.due()
    assert not meeting.over


def test_who_waits_for_the_others_makes_no_more_than_it_will_have_to() -> None:
    """One is at 30 of its 125 steps; the other may come with all its 125 made."""
    rows = [[0, 0, 0, 125, 0, 0, 0, 0], [0, 0, 0, 30, 0, 0, 0, 0]]
    meeting = meetings(1, rows, total_minutes=None)
    source: Any = meeting._parts.source
    source.agent_steps = 30

    def waiting(_: Any) -> list[list[int]]:
        source.agent_steps = 30 + (250 - 125 - 30) // 2
        assert not meeting.enough()
        source.agent_steps += 1
        assert meeting.enough()
        return rows

    group: Any = meeting.group
    group.meet = waiting
    meeting.meet(ready=False, stop=False, elapsed_s=0.0)
    assert meeting._own_end == 30 + 48
