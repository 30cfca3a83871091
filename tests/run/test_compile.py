"""Compiled runs: everything is compiled before the run's threads start, and nothing after."""

from pathlib import Path
from typing import Any

import pytest
import torch

from headrace import preset, train
from headrace.envs.pointmass import POINTMASS
from headrace.records import Batch, PolicyInput
from headrace.run import local
from headrace.run.build import Parts, make_algorithm, make_model
from headrace.specs import EnvSpec


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "env", "settings"),
    [
        ("catch", "catch", {}),
        ("r2d2-control", "recall", {"server": {"eval_envs": 8}, "network": {"lstm_size": 8}}),
        ("sac-control", "pointmass", {"network": {"hidden_sizes": [128, 128]}}),
        ("sac-control", "pointmass", {"actor_device": "cpu", "critic_device": "cpu"}),
    ],
    ids=["impala", "r2d2", "sac", "sac-two-sides"],
)
@pytest.mark.filterwarnings("ignore")  # Inductor and its compiler warn of much that is not ours
def test_nothing_is_compiled_after_the_warm_up(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    env: str,
    settings: dict[str, Any],
) -> None:
    from torch._dynamo.utils import counters  # noqa: PLC0415 - importing it takes seconds

    graphs: list[int] = []
    warm_up = local.warm_up

    def counting(parts: Parts) -> None:
        warm_up(parts)
        graphs.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(local, "warm_up", counting)
    torch.compiler.reset()
    config = preset(
        name, env, total_frames=6_000, compile="on", out=str(tmp_path / "run"), **settings
    )
    result = train(config)
    assert result.metrics["updates"] > 3
    assert graphs[0] > 0, "nothing was compiled, so this test would prove nothing"
    assert counters["stats"]["unique_graphs"] == graphs[0]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_update_of_sac_is_the_eager_one(order: str) -> None:
    config = preset(
        "sac-control",
        "pointmass",
        precision="float32",
        network={"critic_dropout": 0.1, "critic_layer_norm": True, "num_critics": 3},
        learning={"update_order": order, "updates_per_call": 2, "batch_unrolls": 32},
    )
    spec = POINTMASS.spec("pointmass", config.environment)
    cpu = torch.device("cpu")
    pair = [
        make_algorithm(config, make_model(config, spec, cpu), spec, torch.float32) for _ in range(2)
    ]
    torch.compiler.reset()
    pair[1].compile()  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        batch = a_batch(spec, 64, generator)
        for sac in pair:
            assert sac.update(batch, progress=0.0).finite
    for name, tensor in pair[0].model.state_dict().items():
        torch.testing.assert_close(tensor, pair[1].model.state_dict()[name], atol=2e-5, rtol=1e-4)


def a_batch(spec: EnvSpec, count: int, generator: torch.Generator) -> Batch:
    """Transitions of random numbers."""
    zeros = torch.zeros(2, count)
    size, components = spec.stacked_shape[-1], spec.action_space.shape[0]  # type: ignore[index]
    observation = torch.randn(2, count, *spec.stacked_shape[:-1], size, generator=generator)
    inputs = PolicyInput(observation, zeros, torch.zeros(2, count, components), zeros.bool())
    return Batch(
        inputs=inputs,
        recurrent=(),
        action=torch.randn(1, count, components, generator=generator),
        log_prob=zeros[:1],
        reward=torch.randn(1, count, generator=generator),
        terminated=torch.rand(1, count, generator=generator) < 0.1,
        truncated=zeros[:1].bool(),
        bootstrap=zeros[:1],
        version=zeros[:1].long(),
    )
