"""SAC as whole runs: reproducible, resumed with its replay, in both cuts, and refused in time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headrace import evaluate, load, train
from headrace.config import RunConfig, from_dict, merged
from headrace.errors import ConfigError
from headrace.presets import find
from headrace.run.validate import check
from headrace.telemetry.record import read_metrics
from tests.run.test_local import assert_same_weights, stop_after, timeless

REPLAY = {"replay_capacity": 400, "replay_min": 64, "samples_per_insert": 4.0}
SIDES = {"actor_device": "cpu", "critic_device": "cpu"}


def a_config(out: Path, **settings: Any) -> RunConfig:
    base = {
        "env": "pointmass",
        "environment": {"episode_steps": 7},
        "out": str(out),
        "device": "cpu",
        "precision": "float32",
        "lockstep": True,
        "tensorboard": False,
        "total_frames": 1500,
        "log_interval_s": 1e-9,
        "server": {"num_envs": 4},
        "network": {
            "hidden_sizes": [8],
            "critic_dropout": 0.1,
            "critic_layer_norm": True,
            "normalize_observations": True,
        },
        "learning": {"batch_unrolls": 32, "n_steps": 2, "replay": REPLAY},
    }
    return from_dict(merged(merged(find("sac-control").values, base), settings))


def test_one_seed_gives_one_run(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert train(a_config(tmp_path / name)).finished
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    rows = timeless(tmp_path / "a")
    assert rows == timeless(tmp_path / "b")
    assert rows[-1]["updates"] > 50
    assert rows[-1]["samples"] == 32 * rows[-1]["updates"]
    assert rows[-1]["samples_per_insert"] == pytest.approx(4.0, rel=0.25)
    # A seventh of all steps meets the clock, and what each led to is kept.
    skipped = [row["truncated_skipped"] for row in rows if "truncated_skipped" in row]
    assert skipped == [0.0] * len(skipped)
    assert len(skipped) > 10
    assert evaluate(load(tmp_path / "a", device="cpu"), episodes=3).returns.shape == (3,)


def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(a_config(whole))
    for stop in (9, 30):
        resume = halves if halves.exists() else None
        result = train(
            None if resume else a_config(halves), resume=resume, on_update=stop_after(stop)
        )
        assert result.metrics["updates"] == stop
    assert train(resume=halves).finished
    assert_same_weights(whole, halves)
    last, other = (read_metrics(run / "metrics.jsonl")[-1] for run in (whole, halves))
    for name in ("agent_steps", "updates", "samples", "replay_inserted", "temperature"):
        assert last[name] == other[name], name


def test_server_and_learner_may_overlap(tmp_path: Path) -> None:
    result = train(a_config(tmp_path / "run", lockstep=False))
    assert result.finished
    assert result.metrics["updates"] > 20


def test_workers_that_act_fill_the_same_replay(tmp_path: Path) -> None:
    result = train(
        a_config(tmp_path / "run", lockstep=False, inference="worker", workers={"num_workers": 2})
    )
    assert result.finished
    assert result.metrics["updates"] > 20


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"env": "catch", "environment": {}}, "continuous actions, not Discrete"),
        ({"network": {"heads": "policy_value"}}, "sac needs heads actor_critics"),
        ({"network": {"lstm_size": 8}}, "no LSTM"),
        ({"algorithm": "impala", "network": {"heads": "actor_critics"}}, "leave out --heads"),
        ({"algorithm": "impala", "actor_device": "cpu", "critic_device": "cpu"}, "no two sides"),
        ({"learning": {"update_order": "sequential"}, **SIDES}, "leave it out"),
        ({**SIDES, "critic_device": "cuda:99"}, "no device 'cuda:99'"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(
    tmp_path: Path, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        check(config_with(tmp_path, settings))


def config_with(tmp_path: Path, settings: dict[str, Any]) -> RunConfig:
    if "algorithm" in settings:
        return from_dict({"env": "pointmass", **settings})
    values = merged(find("sac-control").values, {"env": "pointmass", "out": str(tmp_path)})
    return from_dict(merged(values, settings))


def test_two_sides_on_one_processor_learn_what_one_learns(tmp_path: Path) -> None:
    """Whole runs, in lockstep: actor and critics in two threads, or one after the other."""
    one = a_config(tmp_path / "one", learning={"update_order": "simultaneous"})
    two = a_config(tmp_path / "two", actor_device="cpu", critic_device="cpu")
    for config in (one, two):
        assert train(config).finished
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    assert timeless(tmp_path / "one") == timeless(tmp_path / "two")


def test_several_updates_at_once_count_as_several(tmp_path: Path) -> None:
    result = train(a_config(tmp_path / "run", learning={"updates_per_call": 4}))
    assert result.metrics["updates"] % 4 == 0
    assert result.metrics["samples"] == 32 * result.metrics["updates"]
    assert result.metrics["samples_per_insert"] == pytest.approx(4.0, rel=0.3)
