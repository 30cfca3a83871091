"""PQN and TD3 as whole runs: reproducible, resumed, in every cut, judged, and from outside."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from headrace import evaluate, load, make_config, train
from headrace.algorithms import td3
from headrace.config import RunConfig, from_dict, merged
from headrace.errors import ConfigError
from headrace.presets import find
from headrace.run.validate import check
from tests.run.test_local import assert_same_weights, stop_after, timeless

REPLAY = {"replay_capacity": 400, "replay_min": 64, "samples_per_insert": 4.0}
CASES: dict[str, dict[str, Any]] = {
    "pqn": {
        "env": "catch",
        "environment": {},
        "server": {"num_envs": 4},
        "network": {"hidden_sizes": [8], "normalize_observations": True},
        "learning": {"unroll_steps": 8, "batch_unrolls": 4, "epochs": 2, "minibatches": 2},
    },
    "td3": {
        "env": "pointmass",
        "environment": {"episode_steps": 7},
        "server": {"num_envs": 4},
        "network": {"hidden_sizes": [8], "normalize_observations": True},
        "learning": {"batch_unrolls": 32, "replay": REPLAY},
    },
}


def a_config(rule: str, out: Path, **settings: Any) -> RunConfig:
    base = {
        "out": str(out),
        "device": "cpu",
        "precision": "float32",
        "lockstep": True,
        "tensorboard": False,
        "total_frames": 1200,
        "log_interval_s": 1e-9,
        **CASES[rule],
    }
    return from_dict(merged(merged(find(f"{rule}-control").values, base), settings))


@pytest.mark.parametrize("rule", CASES)
def test_one_seed_gives_one_run_also_when_it_was_stopped(rule: str, tmp_path: Path) -> None:
    whole, again, halves = (tmp_path / name for name in ("whole", "again", "halves"))
    for out in (whole, again):
        assert train(a_config(rule, out)).finished
    assert_same_weights(whole, again)
    assert timeless(whole) == timeless(again)
    train(a_config(rule, halves), on_update=stop_after(9))
    assert train(resume=halves).finished
    assert_same_weights(whole, halves)
    policy = load(whole, device="cpu")
    assert evaluate(policy, episodes=3).returns.shape == (3,)
    assert policy.judged_mode() == ("greedy", 0.0)


@pytest.mark.parametrize("rule", CASES)
@pytest.mark.parametrize(
    "cut",
    [
        {"server": {"eval_envs": 2}},
        {"turns": "off"},
        {"inference": "worker", "workers": {"num_workers": 2}},
        {"pool": "device"},
    ],
    ids=["overlap", "free", "workers", "device"],
)
def test_every_cut_learns(rule: str, cut: dict[str, Any], tmp_path: Path) -> None:
    result = train(a_config(rule, tmp_path / "run", lockstep=False, **cut))
    assert result.finished
    assert result.metrics["updates"] > 10


@pytest.mark.parametrize(
    ("rule", "settings", "complaint"),
    [
        ("pqn", {"env": "pointmass"}, "needs one discrete"),
        ("pqn", {"network": {"lstm_size": 8}}, "recurrent state: say --lstm-size 0"),
        ("pqn", {"network": {"heads": "policy_value"}}, "pqn needs heads action_value"),
        ("td3", {"env": "recall"}, "need continuous actions, not Discrete"),
        ("td3", {"network": {"lstm_size": 8}}, "no LSTM"),
        ("td3", {"actor_device": "cpu", "critic_device": "cpu"}, "no two sides"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(
    rule: str, settings: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    without = {"environment": {}} if "env" in settings else {}
    values = merged(find(f"{rule}-control").values, {**CASES[rule], **without})
    with pytest.raises(ConfigError, match=complaint):
        check(from_dict(merged(values, {"out": str(tmp_path / "run"), **settings})))


@pytest.mark.parametrize(
    ("env", "rule", "name"),
    [
        ("CartPole-v1", "pqn", "pqn-control"),
        ("recall", "pqn", "pqn-control"),
        ("Pendulum-v1", "td3", "td3-control"),
        ("pointmass", "td3", "td3-control"),
    ],
)
def test_settings_without_a_preset_suit_the_environment(env: str, rule: str, name: str) -> None:
    config = make_config(env, algorithm=rule)
    assert config.preset == name
    assert config.network.layer_norm == (rule == "pqn")


def test_the_file_of_td3_works_from_outside_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of it, named as a user names a rule of their own, takes the same steps."""
    (tmp_path / "my_module.py").write_text(inspect.getsource(td3).replace("Td3(", "TD3("))
    monkeypatch.syspath_prepend(str(tmp_path))
    ours, own = tmp_path / "ours", tmp_path / "own"
    assert train(a_config("td3", ours)).finished
    values = merged(find("td3-control").values, {"algorithm": "my_module:TD3"})
    base = {
        "out": str(own),
        "device": "cpu",
        "precision": "float32",
        "lockstep": True,
        "tensorboard": False,
        "total_frames": 1200,
        **CASES["td3"],
    }
    assert train(from_dict(merged(values, base))).finished
    assert_same_weights(ours, own)
    with pytest.raises(ConfigError, match="code outside headrace"):
        load(own, device="cpu")
    assert evaluate(load(own, trust_code=True, device="cpu"), episodes=3).returns.shape == (3,)
