"""Roles beside training: what they are given, what becomes of what they find, and their deaths."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from headrace import RunConfig, catalog, train
from headrace.config import from_dict, merged
from headrace.learner import checkpoint
from headrace.presets import find
from headrace.run import local
from headrace.run import roles as roles_module
from headrace.run.build import make_model
from headrace.run.report import Row
from headrace.run.roles import Roles
from headrace.telemetry.record import RunDirectory, read_metrics
from headrace.weights import SharedWeights
from tests.run.test_acting_workers import nothing_left, open_files  # noqa: F401 - a fixture

START = "from headrace.errors import PeerLost\nfrom headrace.pools.processes import WorkerEnd\n"
ASKS = """
end, question = WorkerEnd.open(), 0
try:
    while True:
        question += 1
        end.status({"wants": question})
        number, version = map(int, end.receive().split())
        assert number == question
        end.status({"evaluation": {"version": version, "agent_steps": 10 * version,
                                   "returns": [1.0, 4.0], "lengths": [4, 7]}})
except PeerLost:
    pass
"""
SILENT = """
end = WorkerEnd.open()
end.status({"note": "here"})
try:
    end.receive()
except PeerLost:
    pass
"""
DEAF = """
import time
end = WorkerEnd.open()
end.status({"note": "here"})
time.sleep(600.0)
"""
FILMS = """
end = WorkerEnd.open()
for path in ("a.mp4", "b.mp4"):
    end.status({"clip": path, "return": 1.0})
    end.status({"note": f"{path} is there"})
try:
    end.receive()
except PeerLost:
    pass
"""
RAISES = 'WorkerEnd.open()\nraise RuntimeError("no game today")\n'

BROKEN_WHERE_JUDGED = """
import dataclasses
from headrace.envs.catch import CatchFamily

class Family(CatchFamily):
    def spec(self, name, config):
        return super().spec("catch", config)

    def evaluation(self, config):
        return dataclasses.replace(config, truncate_after=99)

    def make(self, name, config, **rest):
        if config.truncate_after == 99:
            raise RuntimeError("nobody can be judged here")
        return super().make(name, config, **rest)

FAMILY = Family()
"""


def a_config(out: Path, **settings: Any) -> RunConfig:
    base = {
        "env": "catch",
        "out": str(out),
        "device": "cpu",
        "precision": "float32",
        "pool": "inline",
        "turns": "on",
        "tensorboard": False,
        "total_frames": 10**9,
        "log_interval_s": 0.1,
        "server": {"num_envs": 8},
        "workers": {"max_worker_deaths": 3},
        "learning": {"unroll_steps": 7, "batch_unrolls": 6},
        "evaluator": {"evaluator": True},
    }
    return from_dict(merged(merged(find("catch").values, base), settings))


def is_gone(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return False
    return True


class Scripted:
    """Roles whose programs are a few lines, so that they start without torch."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self.published: list[int] = []
        self.model = nn.Linear(3, 2)
        self.folder = folder
        self._monkeypatch = monkeypatch
        monkeypatch.syspath_prepend(str(folder))
        publish = SharedWeights.publish

        def counted(weights: SharedWeights, model: nn.Module, version: int) -> None:
            self.published.append(version)
            publish(weights, model, version)

        monkeypatch.setattr(SharedWeights, "publish", counted)

    def start(self, scripts: dict[str, str], **settings: Any) -> Roles:
        for name, script in scripts.items():
            self.write(name, script)
        viewer = {"watch": "viewer" in scripts}
        evaluator = {"evaluator": "evaluator" in scripts}
        return Roles(
            a_config(self.folder, evaluator=evaluator, viewer=viewer, **settings),
            self.folder,
            self.model,
            on_message=self.said.append,
        )

    def write(self, name: str, script: str) -> None:
        (self.folder / f"a_{name}.py").write_text(START + script)
        self._monkeypatch.setitem(roles_module.MODULES, name, f"a_{name}")


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    return Scripted(tmp_path, monkeypatch)


def attend_until(roles: Roles, happened: Callable[[], bool], version: int = 0) -> None:
    until_s = time.monotonic() + 50.0
    while not happened():
        assert time.monotonic() < until_s, "it never happened"
        roles.attend(version, 10 * version)
        time.sleep(0.005)  # between two looks


def test_who_asks_is_given_the_newest_weights_and_what_it_finds_is_in_the_row(
    scripted: Scripted,
) -> None:
    with closing(scripted.start({"evaluator": ASKS})) as roles:
        assert roles.row(0) == {"evaluator_deaths": 0}
        attend_until(roles, lambda: roles.row(3).get("eval_agent_steps") == 30, version=3)
        attend_until(roles, lambda: roles.row(9).get("eval_agent_steps") == 50, version=5)
        row = roles.row(9)
    count = row.pop("evaluations")
    assert isinstance(count, int)
    assert count >= 2
    assert row == {
        "evaluator_deaths": 0,
        "eval_episodes": 2 * count,
        "eval_return_mean": 2.5,
        "eval_return_min": 1.0,
        "eval_return_max": 4.0,
        "eval_length_mean": 5.5,
        "eval_agent_steps": 50,
        "eval_lag_updates": 4,
    }
    assert scripted.published == [3, 5], "weights that are there already are not copied again"


def test_nothing_is_published_when_nobody_asks(scripted: Scripted) -> None:
    with closing(scripted.start({"evaluator": SILENT})) as roles:
        attend_until(roles, lambda: "evaluator: here" in scripted.said)
        for version in range(50):
            roles.attend(version, version)
    assert scripted.published == []


def test_a_run_without_roles_has_none(scripted: Scripted) -> None:
    before = open_files()
    with closing(scripted.start({})) as roles:
        assert open_files() == before
        assert not roles.due()
        assert roles.row(7) == {}


def test_clips_are_counted_and_every_note_is_told(scripted: Scripted) -> None:
    with closing(scripted.start({"viewer": FILMS, "evaluator": ASKS})) as roles:
        attend_until(roles, lambda: "viewer: b.mp4 is there" in scripted.said)
        row = roles.row(0)
    assert "viewer: a.mp4 is there" in scripted.said
    assert (row["clips"], row["viewer_deaths"], row["evaluator_deaths"]) == (2, 0, 0)


def test_a_role_that_is_killed_is_counted_and_started_again(scripted: Scripted) -> None:
    with closing(scripted.start({"evaluator": ASKS, "viewer": SILENT})) as roles:
        attend_until(
            roles, lambda: "evaluations" in roles.row(0) and "viewer: here" in scripted.said
        )
        first, viewer = roles.pids()["evaluator"], roles.pids()["viewer"]
        os.kill(first, signal.SIGKILL)
        attend_until(roles, lambda: roles.row(0)["evaluator_deaths"] == 1)
        seen = roles.row(0)["evaluations"]
        attend_until(roles, lambda: roles.row(0)["evaluations"] > seen)  # type: ignore[operator]
        second = roles.pids()["evaluator"]
        assert second != first
        assert roles.pids()["viewer"] == viewer
        assert roles.row(0)["viewer_deaths"] == 0
    assert any("evaluator died: killed (SIGKILL)" in text for text in scripted.said)
    assert is_gone(first)
    assert is_gone(second)
    assert is_gone(viewer)


def test_a_role_that_dies_again_and_again_is_left_dead_and_said_so_once(scripted: Scripted) -> None:
    with closing(scripted.start({"evaluator": RAISES, "viewer": SILENT})) as roles:
        attend_until(roles, lambda: any("goes on without" in text for text in scripted.said))
        attend_until(roles, lambda: "viewer: here" in scripted.said)
        for _ in range(5):
            roles.attend(1, 1)
        assert roles.row(0)["evaluator_deaths"] == 3
        assert list(roles.pids()) == ["viewer"]
    [last] = [text for text in scripted.said if "goes on without" in text]
    assert last.startswith("evaluator died 3 times in a row, first: RuntimeError: no game today")
    assert last.endswith("training goes on without the evaluator")


def test_a_role_that_cannot_be_started_does_not_stop_the_run(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_more(*_: Any, **__: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(roles_module, "_Telling", no_more)
    with closing(scripted.start({"evaluator": ASKS})) as roles:
        roles.attend(0, 0)
        assert roles.pids() == {}
    assert scripted.said == [
        "evaluator cannot be started: Resource temporarily unavailable; "
        "training goes on without the evaluator"
    ]


def test_a_role_that_hears_nothing_is_ended_all_the_same(scripted: Scripted) -> None:
    with closing(scripted.start({"evaluator": DEAF})) as roles:
        attend_until(roles, lambda: "evaluator: here" in scripted.said)
        pid = roles.pids()["evaluator"]
    assert is_gone(pid)
    assert roles.pids() == {}
    roles.close()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Roles]]:
    """The roles of the runs that the test starts."""
    instances: list[Roles] = []

    class Noted(Roles):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            instances.append(self)

    monkeypatch.setattr(local, "Roles", Noted)
    yield instances
    instances.clear()


class Until:
    """Ends a run, by a signal, at the first row that is good enough."""

    def __init__(self, is_enough: Callable[[Row], bool]) -> None:
        self._is_enough = is_enough
        self._ended = False

    def __call__(self, row: Row) -> None:
        if not self._ended and self._is_enough(row):
            self._ended = True  # the last row comes after the signal, and a second one kills
            os.kill(os.getpid(), signal.SIGTERM)


def leave_a_core(*_: Any) -> None:
    time.sleep(0.02)  # to the evaluator, where there are few


def test_newer_and_newer_weights_are_judged(
    tmp_path: Path, started: list[Roles], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roles_module, "NICE", 1)  # a busy machine would let it wait for a minute
    judged: set[float | int | str] = set()
    pids: set[int] = set()
    niceness: set[int] = set()

    def three_were_judged(row: Row) -> bool:
        pids.update(started[0].pids().values())
        if "evaluations" in row:
            niceness.update(os.getpriority(os.PRIO_PROCESS, pid) for pid in pids)
        judged.update([row["eval_agent_steps"]] if "evaluations" in row else [])
        return len(judged) >= 3

    config = a_config(tmp_path / "run")
    result = train(config, on_row=Until(three_were_judged), on_update=leave_a_core)
    rows = read_metrics(result.run / "metrics.jsonl")
    steps = [row["eval_agent_steps"] for row in rows if "eval_return_mean" in row]
    assert steps == sorted(steps)
    assert len(set(steps)) >= 3
    assert rows[-1]["evaluator_deaths"] == 0
    assert rows[-1]["eval_length_mean"] == 9.0, "a game of catch takes 9 steps"
    assert -1.0 <= rows[-1]["eval_return_min"] <= rows[-1]["eval_return_mean"] <= 1.0
    assert rows[-1]["eval_lag_updates"] >= 0
    assert niceness == {os.getpriority(os.PRIO_PROCESS, 0) + 1}, "it stands back"
    assert len(pids) == 1
    assert all(is_gone(pid) for pid in pids)


@pytest.mark.parametrize("inference", ["server", "worker"])
def test_training_outlives_its_evaluator(
    tmp_path: Path, scripted: Scripted, started: list[Roles], inference: str
) -> None:
    scripted.write("evaluator", ASKS)
    pids: list[int] = []
    updates: list[float | int | str] = []  # at the death, and when its successor was heard

    def lived_twice(row: Row) -> bool:
        if "evaluations" not in row:
            return False
        pids.extend(pid for pid in started[0].pids().values() if pid not in pids)
        if not updates:
            updates.extend([row["updates"], row["evaluations"]])
            os.kill(pids[0], signal.SIGKILL)
        return len(pids) == 2 and row["updates"] > updates[0] and row["evaluations"] > updates[1]

    turns = "on" if inference == "server" else "auto"
    config = a_config(
        tmp_path / "run", inference=inference, turns=turns, workers={"num_workers": 1}
    )
    result = train(config, on_row=Until(lived_twice))
    assert result.metrics["evaluator_deaths"] == 1
    assert result.metrics["worker_deaths"] == 0
    log = RunDirectory.open(result.run).log_path.read_text(encoding="utf-8")
    assert "evaluator died: killed (SIGKILL)" in log
    assert "goes on without" not in log
    assert all(is_gone(pid) for pid in pids)


def test_a_run_ends_well_whose_evaluator_cannot_live(
    tmp_path: Path, scripted: Scripted, started: list[Roles], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.write("evaluator", RAISES)
    monkeypatch.setattr(local.Session, "over", lambda _: started[0].row(0)["evaluator_deaths"] == 3)
    result = train(a_config(tmp_path / "run"))
    assert result.finished
    assert result.metrics["evaluator_deaths"] == 3
    log = RunDirectory.open(result.run).log_path.read_text(encoding="utf-8")
    assert log.count("training goes on without the evaluator") == 1


def test_an_evaluator_whose_environment_raises_says_why(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real one: its last words name the environment's fault."""
    monkeypatch.setattr(roles_module, "NICE", 1)
    (scripted.folder / "never_judged.py").write_text(BROKEN_WHERE_JUDGED)
    config = a_config(scripted.folder, env="never_judged:FAMILY", workers={"max_worker_deaths": 1})
    spec = catalog.environment_family(config.env).spec(config.env, config.environment)
    model = make_model(config, spec, torch.device("cpu"))
    roles = Roles(config, scripted.folder, model, on_message=scripted.said.append)
    with closing(roles):
        attend_until(roles, lambda: roles.row(0)["evaluator_deaths"] == 1)
    assert scripted.published == [0]
    assert len(scripted.said) == 1
    assert "RuntimeError: nobody can be judged here (never_judged.py:" in scripted.said[0]


def test_who_looks_changes_nothing(
    tmp_path: Path, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Publishing draws no random number and touches no weight: lockstep is as it was."""
    train(
        a_config(
            tmp_path / "alone", lockstep=True, total_frames=1500, evaluator={"evaluator": False}
        )
    )

    class Eager(Roles):
        def due(self) -> bool:
            return True

        def attend(self, version: int, agent_steps: int) -> None:
            for role in self._roles:
                role.question = 1
            super().attend(version, agent_steps)

    monkeypatch.setattr(local, "Roles", Eager)
    scripted.write("evaluator", SILENT)
    train(a_config(tmp_path / "seen", lockstep=True, total_frames=1500))
    assert len(scripted.published) > 10
    alone, seen = (
        checkpoint.newest_whole(tmp_path / name / "checkpoints")[0] for name in ("alone", "seen")
    )
    assert alone is not None
    assert seen is not None
    assert alone.tensors.keys() == seen.tensors.keys()
    for group, tensors in alone.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, seen.tensors[group][name]), f"{group}: {name}"
