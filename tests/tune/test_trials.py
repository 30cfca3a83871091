"""Trials in child processes: what they measure, and what becomes of those that fail."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from headrace.config import RunConfig, from_dict, to_dict
from headrace.experience.limiter import SampleLimiter
from headrace.learner.feeds import ReplayFeed
from headrace.pools.processes import WorkerProcess
from headrace.telemetry.metrics import Waits
from headrace.tune import trials
from headrace.tune.child import Approach, balanced
from headrace.tune.trials import Trials, run_child, score_of, trial_config

PATIENT_S = 60.0


def config_of(env: str = "catch", algorithm: str = "impala", **values: Any) -> RunConfig:
    small = {"device": "cpu", "compile": "off", "server": {"num_envs": 4}}
    return from_dict({"env": env, "algorithm": algorithm, **small, **values})


CATCH = config_of(learning={"unroll_steps": 5, "batch_unrolls": 4})


@pytest.mark.parametrize(
    "config",
    [
        CATCH,
        pytest.param(
            config_of(
                inference="worker",
                workers={"num_workers": 1},
                learning={"unroll_steps": 5, "batch_unrolls": 4},
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            config_of(algorithm="ppo", learning={"unroll_steps": 8, "batch_unrolls": 4}),
            marks=pytest.mark.slow,
        ),
        config_of(
            "pointmass",
            "sac",
            learning={
                "batch_unrolls": 16,
                "replay": {"samples_per_insert": 16.0, "replay_min": 10_000},
            },
        ),
    ],
    ids=["catch", "acting-workers", "in-turns", "pointmass-sac"],
)
def test_a_trial_measures_a_run(config: RunConfig) -> None:
    measure = Trials(config, lambda _: {}, combined=False)
    outcome = measure({}, seconds=0.3, deadline_s=PATIENT_S)
    assert outcome.failure is None
    figures = outcome.figures
    assert outcome.score == figures["agent_steps_per_s"] > 0
    assert figures["updates_per_s"] > 0
    assert figures["bottleneck"] in {"environments", "server", "learner", "none"}
    assert figures["compute_threads"] >= 1
    assert not figures["compiled"]
    if config.algorithm == "sac":
        assert figures["samples_per_agent_step"] == 16.0
        # Batches of 16: an update for each step, and so it is told, whoever was ahead.
        assert figures["updates_per_s"] == pytest.approx(figures["agent_steps_per_s"])


def test_the_stages_are_measured_alone() -> None:
    settings = {"config": to_dict(CATCH), "samples_per_agent_step": 1.0, "seconds": 0.05}
    ceiling = run_child(settings, deadline_s=PATIENT_S)
    assert isinstance(ceiling, dict)
    assert ceiling["model"] == "core-time"
    assert min(ceiling["environment"], ceiling["inference"], ceiling["learner"]) > 0


def test_a_refused_choice_is_a_failure_with_its_sentence() -> None:
    measure = Trials(CATCH, lambda _: {"server": {"num_envs": 0}}, combined=False)
    outcome = measure({}, seconds=0.1, deadline_s=PATIENT_S)
    assert outcome.score == 0.0
    assert outcome.failure == "num_envs must be at least 1, not 0"


def test_what_the_child_refuses_is_a_sentence_too() -> None:
    measure = Trials(CATCH, lambda _: {"server": {"queue_unrolls": 1}}, combined=False)
    outcome = measure({}, seconds=0.1, deadline_s=PATIENT_S)
    assert outcome.failure is not None
    assert outcome.failure.startswith("queue_unrolls=1 can never hold a batch of batch_unrolls=4")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs that trials may run."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


BEGIN = "from headrace.pools.processes import WorkerEnd\nend = WorkerEnd.open()\n"


def test_a_crash_is_a_failure(programs: Path) -> None:
    text = BEGIN + "import os, signal\nprint('farewell')\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    (programs / "crashing_trial.py").write_text(text)
    failure = run_child({}, deadline_s=PATIENT_S, module="crashing_trial")
    assert isinstance(failure, str)
    assert "SIGSEGV" in failure
    assert len(failure) <= 300


def test_a_hang_is_killed_at_its_deadline(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = BEGIN + "end.status({'ready': 1})\nprint('x' * 100_000)\nend.receive()\n"
    (programs / "hanging_trial.py").write_text(text)
    started: list[WorkerProcess] = []

    class Watched(WorkerProcess):
        ready = False

        def __init__(self, *arguments: Any, **others: Any) -> None:
            super().__init__(*arguments, **others)
            started.append(self)

        def messages(self) -> list[dict[str, Any]]:
            messages = super().messages()
            Watched.ready = Watched.ready or any("ready" in message for message in messages)
            return messages

    monkeypatch.setattr(trials, "WorkerProcess", Watched)
    since_s = time.monotonic()

    def now_s() -> float:  # an hour passes as soon as it hangs
        return time.monotonic() + (3600.0 if Watched.ready else 0.0)

    failure = run_child({}, deadline_s=1800.0, module="hanging_trial", now_s=now_s)
    assert isinstance(failure, str)
    assert failure.startswith("gave no result within 1800 s")
    assert time.monotonic() - since_s < 60.0
    with pytest.raises(ProcessLookupError):
        os.kill(started[0].pid, 0)


def test_ctrl_c_takes_the_child_along(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (programs / "waiting_trial.py").write_text(BEGIN + "end.receive()\n")
    started: list[WorkerProcess] = []

    class Watched(WorkerProcess):
        def __init__(self, *arguments: Any, **others: Any) -> None:
            super().__init__(*arguments, **others)
            started.append(self)

        def printed(self) -> list[str]:
            raise KeyboardInterrupt

    monkeypatch.setattr(trials, "WorkerProcess", Watched)
    with pytest.raises(KeyboardInterrupt):
        run_child({}, deadline_s=PATIENT_S, module="waiting_trial")
    with pytest.raises(ProcessLookupError):
        os.kill(started[0].pid, 0)


def test_a_trial_learns_from_the_start_and_writes_nothing() -> None:
    config = config_of(
        "pointmass",
        "sac",
        wandb="project",
        server={"num_envs": 4, "eval_envs": 2},
        learning={"batch_unrolls": 64, "replay": {"replay_min": 5_000}},
    )
    trial = trial_config(config)
    assert (trial.wandb, trial.server.eval_envs) == ("", 0)
    assert trial.learning.replay.replay_min == 64
    # All that its speed depends on is the run's own.
    assert trial.learning.replay.replay_capacity == config.learning.replay.replay_capacity
    assert trial.learning.optimizer == config.learning.optimizer
    early = config_of("pointmass", "sac", learning={"replay": {"replay_min": 5}})
    assert trial_config(early).learning.replay.replay_min == 5


FIGURES = {"agent_steps_per_s": 100.0, "samples_per_s": 6400.0}


def test_the_score_is_agent_steps_or_a_compromise() -> None:
    assert score_of(FIGURES, combined=False) == 100.0
    assert score_of(FIGURES, combined=True) == 800.0
    halved = {"agent_steps_per_s": 200.0, "samples_per_s": 3200.0}
    assert score_of(halved, combined=True) == 800.0


def test_a_limit_holds_in_the_long_run() -> None:
    assert balanced(100.0, 6400.0, None) == (100.0, 6400.0)
    # While environments run ahead of the limit, the learner tells the speed; and the reverse.
    assert balanced(100.0, 6400.0, 128.0) == (50.0, 6400.0)
    assert balanced(100.0, 6400.0, 32.0) == (100.0, 3200.0)


class _Experience(NamedTuple):
    unrolls_per_call: int


class _Algorithm(NamedTuple):
    experience: _Experience


class _Parts(NamedTuple):
    feed: Any
    algorithm: Any = _Algorithm(_Experience(4))


class _Learner:
    def learn(self, **_: Any) -> object:
        return object()


def approach(limiter: SampleLimiter | None, clock: list[float]) -> Approach:
    feed: Any = None
    if limiter is not None:
        feed = object.__new__(ReplayFeed)
        feed.limiter = limiter
    parts: Any = _Parts(feed)
    learner: Any = _Learner()
    return Approach(parts, learner, Waits(), longest_s=8.0, now_s=lambda: clock[0])


def test_without_a_limit_there_is_no_balance_to_wait_for() -> None:
    free = SampleLimiter(0.0, min_inserted=1, batch=4, max_insert=4)
    assert approach(None, [0.0]).over()
    assert approach(free, [0.0]).over()


@pytest.mark.parametrize(("inserted", "sampled"), [(21, 0), (1, 0)])
def test_the_window_waits_until_a_side_is_held_back(inserted: int, sampled: int) -> None:
    limiter = SampleLimiter(4.0, min_inserted=1, batch=4, max_insert=4)
    before = approach(limiter, [0.0])
    assert not before.over()  # before the first update
    before.learn(0.0)
    limiter.inserted(5)
    limiter.sampled(16)
    assert not before.over()
    limiter.inserted(inserted - 1)
    limiter.sampled(0 if inserted > 1 else 20)
    assert before.over()


def test_the_window_does_not_wait_for_ever() -> None:
    clock = [100.0]
    before = approach(SampleLimiter(4.0, min_inserted=1, batch=4, max_insert=4), clock)
    before._learner = _Learner()  # type: ignore[assignment]
    before.parts.feed.limiter.inserted(2)  # type: ignore[attr-defined]
    before.learn(0.0)
    assert not before.over()
    clock[0] = 108.0
    assert before.over()
