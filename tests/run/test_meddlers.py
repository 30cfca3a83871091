"""Code of a user's changes processes of ours, and a run is what it would have been."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import headrace
from headrace.apart import ASPECTS
from headrace.config import from_dict, merged
from headrace.envs import gymnasium
from headrace.run.api import train
from headrace.run.policy import load
from tests.run import meddlers
from tests.run.test_local import assert_same_weights

ENV = "tests.run.meddlers:Meddler"
SETTINGS: dict[str, Any] = {
    "env": ENV,
    "algorithm": "impala",
    "device": "cpu",
    "precision": "float32",
    "lockstep": True,
    "tensorboard": False,
    "total_frames": 400,
    "log_interval_s": 1e-9,
    "server": {"num_envs": 8},
    "learning": {"unroll_steps": 5, "batch_unrolls": 4},
    "network": {"network": "mlp", "hidden_sizes": [8]},
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, and modules found from where they were."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2]), *sys.path])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config_of(out: str, *, what: str = "", when: str = "make", **more: Any) -> Any:
    keywords = {"what": what, "when": when} | more.pop("keywords", {})
    environment = {"env_kwargs": json.dumps(keywords)}
    return from_dict(merged(SETTINGS, {"out": out, "environment": environment, **more}))


def state() -> dict[str, Any]:
    return {name: aspect.read() for name, aspect in ASPECTS.items() if name != "loggers"}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose environments change nothing."""
    return train(config_of(str(tmp_path_factory.mktemp("run") / "untouched"))).run


@pytest.mark.parametrize(
    ("what", "when"),
    [
        *((what, "make") for what in meddlers.WHATS),
        ("folder", "step"),
        ("numpy", "reset"),
        ("dtype", "reset"),
        ("device", "step"),
        ("gradients", "step"),
        ("the rest", "close"),
    ],
)
def test_a_run_is_what_it_is_without(what: str, when: str, here: Path, untouched: Path) -> None:
    before = state()
    result = train(config_of("mine", what=what, when=when))
    assert result.run == here / "mine"
    assert result.finished
    assert_same_weights(result.run, untouched)
    assert len((result.run / "log.txt").read_text().splitlines()) > 0
    assert state() == before


def test_in_worker_processes_only_those_are_touched(here: Path) -> None:
    """And no environment is made in this one at all: the trial says what they are."""
    pids = here / "pids"
    keywords = {"pids": str(pids)}
    settings = {"lockstep": False, "workers": {"num_workers": 2}, "keywords": keywords}
    before = state()
    config = config_of("mine", what="the rest", **settings)
    result = train(config)
    assert result.run == here / "mine"
    assert result.finished
    made = [int(pid) for pid in pids.read_text().split()]
    assert os.getpid() not in made
    assert len(made) > 8
    assert state() == before


def test_a_worker_judges_numbers_as_ever() -> None:
    assert train(config_of("mine", what="numpy", lockstep=False)).finished


def test_workers_that_act_go_on_too() -> None:
    settings = {"lockstep": False, "inference": "worker", "workers": {"num_workers": 1}}
    assert train(config_of("mine", what="dtype, device, gradients", **settings)).finished


def test_a_network_leaves_what_was() -> None:
    before = state()
    network = {"network": "tests.run.meddling_parts:network", "hidden_sizes": [8]}
    assert train(config_of("mine", network=network)).finished
    assert state() == before


def test_an_algorithm_leaves_what_was(untouched: Path) -> None:
    before = state()
    result = train(config_of("mine", algorithm="tests.run.meddling_parts:Rule"))
    assert state() == before
    assert_same_weights(result.run, untouched)


def test_functions_that_are_called_amid_training_leave_torch_as_it_was(
    here: Path, untouched: Path
) -> None:
    def meddle(*_: Any) -> None:
        for what in ("dtype", "gradients", "folder"):
            meddlers.meddle(what)

    before = state()
    result = train(config_of("mine"), on_row=meddle, on_update=meddle, on_checkpoint=meddle)
    assert state() == before
    assert_same_weights(result.run, untouched)


def test_a_script_that_has_torch_another_way_trains_the_same(here: Path, untouched: Path) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    try:
        result = train(config_of("mine"))
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
    assert_same_weights(result.run, untouched)


def test_a_policy_is_loaded_and_judged_where_the_user_is() -> None:
    train(config_of("mine", what="folder, dtype, gradients, numpy"))
    before = state()
    policy = load("mine", trust_code=True)
    assert headrace.evaluate(policy, episodes=3).returns.shape == (3,)
    env = policy.make_env(seed=1)
    observation, _ = env.reset()
    action, _ = policy.act(observation, policy.initial_state())
    env.step(action)
    env.reset(seed=2)
    env.close()
    assert state() == before


def test_what_an_environment_changed_holds_while_it_runs(here: Path) -> None:
    """It may have gone to a folder to read its files there."""
    places: list[str] = []

    class Reads(meddlers.Meddler):
        def step(self, action: Any) -> Any:
            places.append(os.getcwd())
            return super().step(action)

    meddlers.Reads = Reads  # type: ignore[attr-defined]
    gymnasium.forget()
    config = config_of("mine", what="folder", server={"num_envs": 1})
    train(dataclasses.replace(config, env="tests.run.meddlers:Reads"))
    assert set(places) == {str(here / "elsewhere")}


def test_numbers_that_a_worker_judges_are_ours_to_judge() -> None:
    batch = gymnasium.GYMNASIUM.make(
        ENV,
        gymnasium.GymnasiumConfig(env_kwargs='{"what": "numpy"}'),
        num_envs=2,
        batch_size=2,
        threads=1,
        seed=0,
    )
    batch.reset()
    step = batch.step(np.arange(2, dtype=np.int32), np.zeros(2, np.int64))
    np.testing.assert_array_equal(step.observation, np.float32(1e-25))
    assert np.geterr()["under"] == "ignore"


def test_lockstep_is_equal_where_environments_draw_from_global_states(here: Path) -> None:
    config = config_of("one", what="the rest", when="none")
    train(config)
    random.seed(1)
    train(config_of("two", what="the rest", when="none"))
    assert_same_weights(here / "one", here / "two")
