"""Threads by the work of the network, and that counting it leaves no trace."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from headrace import catalog
from headrace.algorithms.ppo import Ppo, PpoConfig
from headrace.config import RunConfig, completed
from headrace.networks.models import NetworkConfig, PolicyValueNet, impala_deep, mlp, nature
from headrace.records import PolicyInput
from headrace.run import compute
from headrace.run.build import make_learning
from headrace.run.compute import choose_compute, fit_threads, multiply_adds
from headrace.specs import EnvSpec

IMAGES = EnvSpec(
    name="images",
    observation_space=gym.spaces.Box(0, 255, (84, 84), np.uint8),
    action_space=gym.spaces.Discrete(6),
    frame_stack=4,
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "usable_cores", lambda: 4)


@pytest.mark.parametrize("before", [None, "", "1"])
@pytest.mark.parametrize("fault", [None, RuntimeError, OSError])
@pytest.mark.filterwarnings("ignore")  # of what torch imports
def test_what_torch_starts_to_look_at_the_cpu_finds_no_module_in_this_folder(
    before: str | None, fault: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import cpu_vec_isa  # noqa: PLC0415 - importing it takes seconds

    if before is None:
        monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONSAFEPATH", before)
    seen: list[str | None] = []

    def pick() -> None:
        seen.append(os.environ.get("PYTHONSAFEPATH"))
        if fault is not None:
            raise fault

    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", pick)
    algorithm = compilable(nn.Linear(2, 2))
    compute.compile_update(algorithm, nn.Linear(2, 2), CPU)
    assert seen == ["1"]
    assert os.environ.get("PYTHONSAFEPATH") == before
    compute.compile_update(algorithm, nn.Linear(2, 2), CPU, graphs=False)
    elsewhere = torch.device("meta")
    there = compilable(nn.Linear(2, 2, device=elsewhere))
    compute.compile_update(there, nn.Linear(2, 2, device=elsewhere), elsewhere)
    assert seen == ["1"]
    monkeypatch.delattr(cpu_vec_isa, "pick_vec_isa")
    compute.compile_update(algorithm, nn.Linear(2, 2), CPU)  # a torch that has it elsewhere


def compilable(model: nn.Module) -> Any:
    """What is compiled of an algorithm, and nothing else of it."""
    return SimpleNamespace(model=model, compiles_whole=False, compile=lambda *_, **__: None)


def rule(model: nn.Module, spec: EnvSpec = IMAGES) -> Ppo:
    return Ppo(model, PpoConfig(), spec=spec)


def a_config(**settings: Any) -> RunConfig:
    return completed(RunConfig(env="catch", device="cpu", **settings))


def threads(spec: EnvSpec | None = None, *, learners: int = 1, **settings: Any) -> int:
    config = a_config(**{"algorithm": "ppo", **settings})
    if spec is None:
        spec = catalog.environment_family("catch").spec("catch", config.environment)
    return make_learning(config, spec, learners=learners)[0].threads


def test_threads_follow_the_work_of_the_network() -> None:
    assert threads() == 1  # the boards of catch have two dimensions, and its network is small
    assert threads(network=NetworkConfig(hidden_sizes=(4096, 4096))) == 4
    assert threads(IMAGES) == 4
    assert threads(IMAGES, learners=2) == 2
    assert threads(IMAGES, learning=PpoConfig(unroll_steps=1, batch_unrolls=1, minibatches=1)) == 1
    assert threads(compute_threads=3) == 3
    assert threads(IMAGES, lockstep=True) == 1
    assert threads(IMAGES, algorithm="impala") == 1  # stages overlap


@pytest.mark.parametrize("network", [nature, impala_deep, mlp])
@pytest.mark.parametrize("lstm_size", [0, 32])
def test_multiply_adds_are_those_of_the_products(network: Any, lstm_size: int) -> None:
    model = network(IMAGES, NetworkConfig(lstm_size=lstm_size))
    algorithm = rule(model)
    one = torch.zeros(1, 1, 4, 84, 84, dtype=torch.uint8)
    nothing = torch.zeros(1, 1)
    inputs = PolicyInput(one, nothing, nothing.long(), nothing.bool())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(inputs, model.initial_state(1))
    assert multiply_adds(algorithm, IMAGES) == pytest.approx(
        counter.get_total_flops() / 2, rel=0.03
    )


class Restless(nn.Module):
    """Draws, keeps statistics, and differs between training and judging."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(4, 8, 8, 4), nn.BatchNorm2d(8), nn.Dropout(), nn.Flatten()
        )
        self.passes = 0

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self.body(rows.float() + torch.rand(()))


def test_counting_leaves_no_trace() -> None:
    torso = Restless()
    model = PolicyValueNet(torso, 8 * 20 * 20, IMAGES, NetworkConfig())
    algorithm = rule(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    assert multiply_adds(algorithm, IMAGES) > 4 * 8 * 64 * 400
    assert torch.equal(drawn, torch.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(module.training for module in model.modules())
    assert torso.passes == 0
    assert not any(module._forward_hooks for module in model.modules())


class OnlyBatches(Restless):
    """Takes no single row."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if len(rows) == 1:
            raise ValueError("one row is no batch")
        return super().forward(rows)


def test_a_network_that_takes_no_single_row_is_taken_for_a_large_one() -> None:
    model = PolicyValueNet(OnlyBatches(), 8 * 20 * 20, IMAGES, NetworkConfig())
    config = a_config(algorithm="ppo")
    fitted = fit_threads(choose_compute(config, IMAGES), config, rule(model), IMAGES)
    assert fitted.threads == 4
