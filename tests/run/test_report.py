"""What a row of metrics says: rates over the interval, shares over the session."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from headrace import train
from headrace.algorithms.base import ExperienceSpec
from headrace.run import report
from headrace.run.report import Reporter, bottleneck, transmission_loss
from headrace.telemetry.metrics import EpisodeStats, Quantiles, Waits
from headrace.telemetry.record import read_metrics
from tests.run import test_local, test_sac

FIGURES = {
    *("sampling_hz", "updates_per_s", "update_frame_rate_hz"),
    *("samples_used_share", "transmission_loss"),
}


class Queue(list[int]):
    stale = 0


class Stages:
    """Counters of stages that are not there, a reporter, and its clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, samples: int, stale: int) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(report, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        self.queue = Queue()
        self.queue.stale = stale
        self.source = SimpleNamespace(agent_steps=0, turnaround_s=Quantiles(4))
        self.parts: Any = SimpleNamespace(
            spec=SimpleNamespace(action_repeat=4),
            compute=SimpleNamespace(precision=torch.float32),
            source=self.source,
            queue=self.queue,
            dropped_unrolls=0,
            worker_deaths=0,
            evaluation=None,
        )
        self.learner: Any = SimpleNamespace(
            version=samples // 100,
            samples=samples,
            feed=SimpleNamespace(metrics=dict),
            lag_counts=torch.zeros(4, dtype=torch.int64),
            algorithm=SimpleNamespace(
                model=nn.Linear(1, 1), experience=ExperienceSpec(unroll_steps=20, batch_unrolls=5)
            ),
        )
        self.reporter = Reporter(
            self.parts,
            self.learner,
            Waits(),
            EpisodeStats(),
            EpisodeStats(),
            interval_s=1.0,
            agent_steps=5000,
            elapsed_s=lambda: self.now_s - 90.0,
        )

    def row(self, seconds: float, *, agent_steps: int, updates: int) -> report.Row:
        self.now_s += seconds
        self.source.agent_steps += agent_steps
        self.learner.version += updates
        self.learner.samples += 100 * updates
        return self.reporter.row(None)


def test_agent_steps_are_asked_for_at_every_step_and_count_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stages = Stages(monkeypatch, samples=0, stale=0)
    stages.source.agent_steps = 7
    stages.parts.queue = None  # whose length takes a lock
    assert stages.reporter.agent_steps - 7 == stages.reporter._agent_steps_before
    stages.reporter.others = lambda: report.Counts(agent_steps=5)
    assert stages.reporter.agent_steps - 12 == stages.reporter._agent_steps_before


def test_rates_are_those_of_the_interval_also_after_a_resume(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stages = Stages(monkeypatch, samples=70_000, stale=0)
    row = stages.row(2.0, agent_steps=1000, updates=30)
    assert (row["sampling_hz"], row["agent_steps_per_s"], row["env_frames_per_s"]) == (
        *(500.0, 500.0),
        2000.0,
    )
    assert (row["updates_per_s"], row["update_frame_rate_hz"]) == (15.0, 1500.0)
    assert (row["samples"], row["agent_steps"]) == (73_000, 6000)
    row = stages.row(4.0, agent_steps=0, updates=2)
    assert (row["sampling_hz"], row["updates_per_s"], row["update_frame_rate_hz"]) == (0, 0.5, 50)


def test_what_is_lost_is_lost_for_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(monkeypatch, samples=0, stale=50)  # of a session before
    assert stages.row(1.0, agent_steps=0, updates=0)["transmission_loss"] == 0.0
    assert stages.row(1.0, agent_steps=1000, updates=1)["transmission_loss"] == 0.0
    stages.queue.stale += 3
    stages.parts.dropped_unrolls += 2
    assert stages.row(1.0, agent_steps=0, updates=1)["transmission_loss"] == 0.1
    assert stages.row(1.0, agent_steps=1000, updates=1)["transmission_loss"] == 0.05


def test_a_share_is_never_above_one() -> None:
    # Dropped unrolls count whole, and these were hardly begun.
    assert transmission_loss(3, unroll_steps=20, agent_steps=6) == 1.0
    assert transmission_loss(0, unroll_steps=20, agent_steps=0) == 0.0


def test_rows_of_a_run_that_learns_from_every_unroll_once(tmp_path: Path) -> None:
    config = test_local.a_config(tmp_path / "run")
    last = train(config).metrics
    assert last.keys() >= FIGURES
    learned = float(last["updates"]) * 6
    assert last["samples"] == 7 * learned
    came = learned + float(last["unrolls_waiting"])
    assert last["samples_used_share"] == pytest.approx(learned / came)
    assert last["transmission_loss"] == 0.0
    for row in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert row["sampling_hz"] == row["agent_steps_per_s"]
        assert row["update_frame_rate_hz"] == pytest.approx(7 * 6 * row["updates_per_s"])


def test_rows_of_a_run_with_a_replay(tmp_path: Path) -> None:
    last = train(test_sac.a_config(tmp_path / "run")).metrics
    assert last.keys() >= FIGURES
    assert 0.5 < float(last["samples_used_share"]) < 1.0  # four draws of each, by chance
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert any(row["updates_per_s"] for row in rows)
    for row in rows:
        assert row["update_frame_rate_hz"] == pytest.approx(32 * row["updates_per_s"])


@pytest.mark.parametrize(
    ("environments", "slots", "unrolls", "stage"),
    [
        (0.1, 0.1, 0.1, "none"),
        (0.1, 0.5, 0.1, "learner"),
        (0.5, 0.1, 0.6, "environments"),
        (0.1, 0.1, 0.6, "server"),
        # In turns the server waits for no slots.
        (0.4, None, 0.0, "environments"),
        (0.1, None, 0.0, "none"),
    ],
)
def test_the_stage_that_limits(
    environments: float, slots: float | None, unrolls: float, stage: str
) -> None:
    shares = {"wait/server_for_environments": environments, "wait/learner_for_unrolls": unrolls}
    if slots is not None:
        shares["wait/server_for_slots"] = slots
    assert bottleneck(shares) == stage
