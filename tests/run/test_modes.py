"""A network of the user's with dropout and batch norm: it learns in training mode, acts in eval."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace import RunConfig, evaluate, load, train
from headrace.config import from_dict, merged
from headrace.run.build import Parts, build
from headrace.run.warmup import warm_up
from tests.run.test_local import assert_same_weights, newest, stop_after

SMALL = {"unroll_steps": 7, "batch_unrolls": 6}
REPLAY = {"replay_min": 20}
RUNS: dict[str, dict[str, Any]] = {
    "impala": {"env": "catch", "algorithm": "impala", "learning": SMALL},
    "impala-minibatches": {
        "env": "catch",
        "algorithm": "impala",
        "learning": {**SMALL, "minibatches": 2},
    },
    "ppo": {"env": "catch", "algorithm": "ppo", "learning": {**SMALL, "minibatches": 2}},
    "r2d2": {
        "env": "catch",
        "algorithm": "r2d2",
        "network": {"lstm_size": 8},
        "learning": {
            "unroll_steps": 4,
            "burn_in_steps": 4,
            "n_steps": 2,
            "batch_unrolls": 4,
            "target_update_interval": 3,
            "replay": REPLAY,
        },
        "environment": {"truncate_after": 5},
    },
    "sac": {
        "env": "pointmass",
        "algorithm": "sac",
        "learning": {"batch_unrolls": 16, "replay": REPLAY},
    },
}


def a_config(out: Path | str, rule: str, network: str = "strict", **settings: Any) -> RunConfig:
    base = {
        "out": str(out),
        "device": "cpu",
        "precision": "float32",
        "compile": "off",
        "tensorboard": False,
        "total_frames": 1200,
        "server": {"num_envs": 8},
        "network": {"network": f"users_parts:{network}"},
    }
    return from_dict(merged(merged(base, RUNS[rule]), settings))


@pytest.fixture(autouse=True)
def _networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.mark.parametrize("rule", RUNS)
def test_statistics_move_where_it_learns_and_nowhere_else(tmp_path: Path, rule: str) -> None:
    """The network itself raises where it runs in the wrong mode; see `users_parts`."""
    out = tmp_path / "run"
    train(a_config(out, rule, lockstep=True, server={"eval_envs": 3}))
    policy = load(out, trust_code=True)
    model: Any = policy.actor("greedy", 0.0).model
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    (passes,) = {
        int(buffer)
        for name, buffer in before.items()
        if "num_batches" in name and "critics" not in name
    }
    updates = newest(out).meta["counters"]["updates"]
    steps = {"ppo": 4 * 2, "impala-minibatches": 2}.get(rule, 1)  # ppo's epochs are four
    assert passes == updates * steps
    results = [evaluate(policy, episodes=3, seed=3).returns for _ in range(2)]
    np.testing.assert_array_equal(*results)
    seen = np.zeros(policy.spec.observation_space.shape, policy.spec.observation_space.dtype)
    policy.act(seen, policy.initial_state(), reset=True)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize(
    "settings",
    [
        {"inference": "worker", "workers": {"num_workers": 1}},
        {"pool": "device"},
        {"pool": "shm", "server": {"eval_envs": 2}},
    ],
    ids=["workers", "device-pool", "server-thread"],
)
def test_whoever_acts_does_so_in_eval_mode(tmp_path: Path, settings: dict[str, Any]) -> None:
    result = train(a_config(tmp_path / "run", "impala", **settings))
    assert result.metrics["updates"] > 10


def built(rule: str, network: str = "strict") -> Parts:
    parts = build(
        a_config("", rule, network, lockstep=True),
        resume_count=0,
        on_episodes=lambda *_: None,
        on_eval_episodes=lambda *_: None,
    )
    parts.close()
    return parts


@pytest.mark.parametrize("rule", RUNS)
def test_the_networks_that_act_or_give_targets_are_copies_in_eval_mode(rule: str) -> None:
    parts = built(rule)
    algorithm: Any = parts.algorithm
    targets = [getattr(algorithm, name, None) for name in ("target_model", "target_critics")]
    for model in filter(None, (parts.server_model, *targets)):
        assert not any(part.training or part is algorithm.model for part in model.modules())
    assert all(part.training for part in algorithm.model.modules())


@pytest.mark.parametrize("rule", RUNS)
def test_a_warm_up_leaves_neither_statistics_nor_draws(rule: str) -> None:
    parts = built(rule)
    before, drawn = copy.deepcopy(parts.algorithm.model.state_dict()), torch.get_rng_state()
    warm_up(parts)
    assert torch.equal(torch.get_rng_state(), drawn)
    for name, tensor in parts.algorithm.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("rule", RUNS)
def test_in_lockstep_one_seed_gives_one_run(tmp_path: Path, rule: str) -> None:
    """With dropout; that of ppo in an environment that draws from all the global states."""
    settings: dict[str, Any] = {"lockstep": True, "total_frames": 600}
    if rule == "ppo":
        settings["env"] = "users_parts:Chancy"
    for name in ("a", "b"):
        train(a_config(tmp_path / name, rule, "dropout", **settings))
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_a_resumed_run_drops_what_it_would_have_dropped(tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    drawn = torch.get_rng_state()
    train(a_config(whole, "ppo", "dropout", lockstep=True))
    assert torch.equal(torch.get_rng_state(), drawn), "the caller's own draws go on"
    config = a_config(halves, "ppo", "dropout", lockstep=True)
    assert not train(config, on_update=stop_after(9)).finished
    assert train(resume=halves, trust_code=True).metrics["updates"] > 20
    assert_same_weights(whole, halves)
