"""R2D2 as whole runs: reproducible, resumed with its replay, in both cuts, and refused in time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace import catalog, train
from headrace.algorithms.r2d2 import R2d2
from headrace.config import RunConfig, from_dict, merged
from headrace.errors import ConfigError
from headrace.experience.replay import Sample
from headrace.learner.feeds import ReplayFeed
from headrace.presets import find
from headrace.records import PolicyInput
from headrace.run import experience
from headrace.run.build import Parts, build, make_learning
from headrace.run.validate import check
from headrace.telemetry.metrics import Waits
from headrace.telemetry.record import read_metrics
from headrace.weights import SharedWeights, WeightsCopy, shared_nbytes
from tests.run.test_local import assert_same_weights, newest, stop_after, timeless

NOBODY: dict[str, Any] = {
    "resume_count": 0,
    "on_episodes": lambda *_: None,
    "on_eval_episodes": lambda *_: None,
}
REPLAY = {"replay_capacity": 60, "replay_min": 10, "samples_per_insert": 4.0}


def a_config(out: Path, preset: str = "r2d2-control", **settings: Any) -> RunConfig:
    base = {
        "env": "recall",
        "out": str(out),
        "device": "cpu",
        "precision": "float32",
        "lockstep": True,
        "tensorboard": False,
        "total_frames": 3000,
        "log_interval_s": 1e-9,
        "server": {"num_envs": 8},
        "network": {"lstm_size": 8},
        "learning": {
            "unroll_steps": 6,
            "burn_in_steps": 3,
            "batch_unrolls": 8,
            "target_update_interval": 7,
            "replay": REPLAY,
        },
    }
    if preset == "dqn-control":
        base["network"] = {"lstm_size": 0}
        base["learning"] = {"batch_unrolls": 16, "replay": {**REPLAY, "replay_capacity": 400}}
    return from_dict(merged(merged(find(preset).values, base), settings))


@pytest.mark.parametrize("preset", ["r2d2-control", "dqn-control"])
def test_one_seed_gives_one_run(tmp_path: Path, preset: str) -> None:
    for name in ("a", "b"):
        assert train(a_config(tmp_path / name, preset)).finished
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    rows = timeless(tmp_path / "a")
    assert rows == timeless(tmp_path / "b")
    assert rows[-1]["updates"] > 50
    # More came than there is room for, and none was sampled oftener than it may be.
    assert rows[-1]["replay_inserted"] > rows[-1]["replay_sequences"]
    assert rows[-1]["samples_per_insert"] == pytest.approx(4.0, rel=0.25)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"env": "catch", "environment": {"truncate_after": 4}, "server": {"eval_envs": 3}},
        {
            "learning": {
                "epsilon_schedule": "linear",
                "epsilon_decay": 0.6,
                "replay": {**REPLAY, "importance_exponent_schedule": "linear"},
            }
        },
    ],
    ids=["recall", "truncated-and-evaluated", "annealed"],
)
def test_a_resumed_run_is_the_run_that_never_stopped(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(a_config(whole, **settings))
    for stop in (9, 30):
        resume = halves if halves.exists() else None
        config = None if resume else a_config(halves, **settings)
        result = train(config, resume=resume, on_update=stop_after(stop))
        assert result.metrics["updates"] == stop
    assert train(resume=halves).finished
    assert_same_weights(whole, halves)  # of the replay as well: it is a group of its own
    assert "replay" in newest(halves).tensors
    last, other = (read_metrics(run / "metrics.jsonl")[-1] for run in (whole, halves))
    for name in ("agent_steps", "updates", "samples", "replay_inserted", "replay_sampled"):
        assert last[name] == other[name], name
    if "eval_return_mean" in last:  # these actions are drawn too
        assert last["eval_return_mean"] == other["eval_return_mean"]


def test_exploration_comes_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the decay all environments act by the ladder, in front of it at random."""
    learning = {
        "epsilon_schedule": "linear",
        "epsilon_decay": 0.3,
        "epsilon_base": 1e-6,  # of which there is nothing to see
        "replay": {**REPLAY, "replay_min": 20},
    }
    seen: list[tuple[float, float]] = []
    annealed = R2d2.annealed

    def watched(self: R2d2, model: Any, epsilon: torch.Tensor) -> torch.Tensor:
        now = annealed(self, model, epsilon)
        seen.append((float(now.min()), float(now.max())))
        return now

    monkeypatch.setattr(R2d2, "annealed", watched)
    assert train(a_config(tmp_path / "run", learning=learning)).finished
    assert seen[0] == (1.0, 1.0)
    assert seen[-1][1] < 1e-5
    lowest = [low for low, _ in seen]
    assert lowest == sorted(lowest, reverse=True)
    assert len(set(lowest)) > 10
    training = newest(tmp_path / "run").tensors["training"]
    assert [value for name, value in training.items() if "exploration_left" in name] == [0.0]


def test_exploration_comes_down_where_a_worker_acts(tmp_path: Path) -> None:
    """By the weights that it is sent: through a block of shared memory, as from the learner."""
    learning = {"epsilon_schedule": "linear", "epsilon_decay": 0.5, "epsilon_base": 0.2}
    config = a_config(tmp_path / "run", learning=learning)
    spec = catalog.environment_family(config.env).spec(config.env, config.environment)
    (_, learned, learner), (_, acting, actor) = (make_learning(config, spec) for _ in range(2))
    block = bytearray(shared_nbytes(learned))
    end, copy = SharedWeights(learned, block), WeightsCopy(acting, block)
    ladder = learner.exploration(4)  # type: ignore[attr-defined]
    for version, progress in enumerate((0.0, 0.25, 0.5, 1.0)):
        learner._epsilon.advance(progress)  # type: ignore[attr-defined]
        end.publish(learned, version)
        assert copy.pull() == version
        left = max(0.0, 1.0 - 2.0 * progress)
        found = actor.annealed(acting, ladder)  # type: ignore[attr-defined]
        torch.testing.assert_close(found, left + (1 - left) * ladder)


@pytest.mark.parametrize("saved", [False, True])
def test_a_run_that_is_not_in_lockstep_keeps_its_replay_when_asked(
    tmp_path: Path, saved: bool
) -> None:
    learning = {"replay": {**REPLAY, "save_replay": saved}}
    config = a_config(tmp_path / "run", lockstep=False, learning=learning)
    first = train(config).metrics
    assert ("replay" in newest(tmp_path / "run").tensors) == saved
    rows: list[dict[str, Any]] = []
    messages = []

    def keep(row: Any) -> None:
        rows.append(dict(row))

    result = train(resume=tmp_path / "run", changes={"total_frames": 4000}, on_row=keep)
    messages = (tmp_path / "run" / "log.txt").read_text()
    assert ("fills anew" in messages) != saved
    assert result.metrics["updates"] > first["updates"]
    before = first["replay_inserted"] if saved else 0
    assert before <= rows[0]["replay_inserted"] < before + 60


@pytest.mark.slow  # test_sac.py has the quick twin
def test_workers_that_act_fill_the_same_replay(tmp_path: Path) -> None:
    config = a_config(
        tmp_path / "run",
        lockstep=False,
        inference="worker",
        total_frames=3000,
        workers={"num_workers": 2},
    )
    result = train(config)
    assert result.finished
    assert result.metrics["updates"] > 10
    assert result.metrics["samples_per_insert"] == pytest.approx(4.0, rel=0.5)


def test_stored_recurrent_state_is_that_of_the_whole_history(tmp_path: Path) -> None:
    """Stitches all rows of each environment together and runs the policy over them from zero."""
    learning = {"overlap_steps": 1, "replay": {"replay_capacity": 4000, "replay_min": 4000}}
    config = a_config(tmp_path, learning=learning, environment={"delay_steps": 5})
    parts = build(
        config, resume_count=0, on_episodes=lambda *_: None, on_eval_episodes=lambda *_: None
    )
    parts.weights.publish(parts.algorithm.model, 0)
    feed = parts.feed
    assert isinstance(feed, ReplayFeed)
    waits = Waits()
    for _ in range(60):
        parts.training.serve(parts.weights.pull, 1.0, waits)
        if feed.ready():
            assert feed.next(version=0, timeout_s=0.0, waits=waits) is None
    replay = feed.replay
    layout = replay.layout
    slots = np.flatnonzero(replay._rings._alive)
    generation = replay._rings.generation(slots)
    drawn = Sample(slots, generation, np.ones(len(slots), np.float32))
    unrolls = replay.gather(drawn, torch.device("cpu"))
    start = replay._rings._start[slots]
    env = slots // layout.slots_per_env
    assert layout.stride_steps == 5
    assert len(slots) == 8 * ((55 - 9) // 5 + 1)  # the last whole piece ends with row 55
    model: Any = parts.server_model
    started = 0
    for number in range(8):
        own = np.flatnonzero(env == number)
        length = int(start[own].max()) + layout.sequence_steps + 1
        fields = {}
        for name in ("observation", "reward", "previous_action", "reset"):
            values = getattr(unrolls, name)
            whole = values.new_zeros(length, 1, *values.shape[2:])
            for column in own:
                rows = slice(int(start[column]), int(start[column]) + layout.sequence_steps + 1)
                whole[rows, 0] = values[:, column]
            fields[name] = whole
        assert fields["reset"].sum() > 5
        inputs = PolicyInput(**fields)
        inputs = inputs._replace(reward=torch.where(inputs.reset, 0.0, inputs.reward))
        with torch.no_grad():
            output, _ = model(inputs, model.initial_state(1))
        for column in own:
            at = int(start[column])
            for part, states in zip(unrolls.recurrent, output.states, strict=True):
                begins = bool(fields["reset"][at, 0])
                wanted = torch.zeros_like(part[column]) if begins else states[at - 1, 0]
                started += begins
                torch.testing.assert_close(part[column], wanted, rtol=1e-5, atol=1e-6)
    assert 0 < started < len(slots)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"learning": {"replay": {"replay_capacity": 10**12}}},
            r"takes [0-9.]+ GiB.*cpu [0-9.]+ GiB, disk .*lower --replay-capacity",
        ),
        ({"learning": {"replay": {"replay_gib": 1e-6}}}, r"holds no sequence.*raise it"),
        ({"learning": {"replay": {"replay_place": "cuda"}}}, r"needs a run on a GPU"),
        ({"learning": {"replay": {"replay_folder": "/no/such"}}}, r"is no folder"),
        ({"max_policy_lag": 3}, r"leave out --max-policy-lag"),
        ({"env": "pointmass", "environment": {}}, r"one discrete action"),
    ],
    ids=["memory", "gib", "cuda", "folder", "lag", "continuous"],
)
def test_what_cannot_be_is_said_before_anything_starts(
    tmp_path: Path, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check(a_config(tmp_path / "run", **settings))


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_replay_lies_where_it_is_told_to(tmp_path: Path, place: str) -> None:
    replay = {**REPLAY, "replay_place": place, "replay_folder": str(tmp_path)}
    messages: list[str] = []
    config = a_config(tmp_path / "run", learning={"replay": replay})
    parts = build(config, **NOBODY, on_message=messages.append)
    assert frames_are_in_a_file(parts) == (place == "disk")
    where = f"a file in {tmp_path}" if place == "disk" else "cpu memory"
    (told,) = [message for message in messages if message.startswith("replay: ")]
    assert told.endswith(where)
    parts.close()


@pytest.mark.parametrize("is_in_memory", [False, True])
def test_a_replay_goes_to_disk_when_memory_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_in_memory: bool
) -> None:
    # Room for all but the frames, and no folder was named.
    config = a_config(tmp_path / "run", environment={"num_cues": 2000})
    place = build_place(config)
    beside = place.layout.nbytes - place.layout.frame_nbytes
    assert beside < place.layout.frame_nbytes
    monkeypatch.setattr(experience, "free_memory_nbytes", lambda: 2 * beside)
    monkeypatch.setattr(experience, "is_in_memory", lambda _: is_in_memory)
    if is_in_memory:  # a file there would be memory too
        with pytest.raises(ConfigError, match="lower --replay-capacity"):
            check(config)
        return
    parts = build(config, **NOBODY)
    assert frames_are_in_a_file(parts)
    parts.close()


def test_what_lies_beside_the_file_needs_memory_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experience, "free_memory_nbytes", lambda: 1000)
    with pytest.raises(ConfigError, match="lower --replay-capacity"):
        check(a_config(tmp_path / "run", learning={"replay": {"replay_place": "disk"}}))


@pytest.mark.parametrize(
    ("algorithm", "heads"),
    [
        ("r2d2", "policy_value"),
        ("r2d2", "actor_critics"),
        ("impala", "duelling"),
        ("ppo", "duelling"),
    ],
)
def test_heads_that_the_algorithm_cannot_use_are_refused(
    tmp_path: Path, algorithm: str, heads: str
) -> None:
    config = from_dict(
        {"env": "recall", "algorithm": algorithm, "network": {"network": "mlp", "heads": heads}}
    )
    with pytest.raises(ConfigError, match=rf"{algorithm} needs heads .*leave out --heads"):
        check(config)


def test_where_a_replay_lies_may_change_on_resume(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(a_config(run, total_frames=500))
    changes = {"total_frames": 600, "learning": {"replay": {"replay_place": "disk"}}}
    assert train(resume=run, changes=changes).finished
    with pytest.raises(ConfigError, match=r"learning\.replay\.replay_capacity belongs to the run"):
        train(resume=run, changes={"learning": {"replay": {"replay_capacity": 10}}})


def build_place(config: RunConfig) -> experience.Place:
    parts = build(config, **NOBODY)
    place = experience.place_replay(
        config,
        parts.algorithm,
        parts.spec,
        model=parts.server_model,
        device=torch.device("cpu"),
    )
    parts.close()
    assert place is not None
    return place


def frames_are_in_a_file(parts: Parts) -> bool:
    """Looks in the kernel's list of what is mapped where."""
    assert isinstance(parts.feed, ReplayFeed)
    address = parts.feed.replay._rows.frames.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5) if line.count("/") else (line.split()[0], "")
        low, high = (int(end, 16) for end in span.split("-"))
        if low <= address < high:
            return name.endswith("(deleted)") and not name.startswith("/dev/zero")
    raise AssertionError("the frames are nowhere")
