"""Compiled runs: everything is compiled before the run's threads start, and nothing after."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace import preset, train
from headrace.envs.pointmass import POINTMASS
from headrace.errors import ConfigError
from headrace.records import Batch, PolicyInput
from headrace.run import compute, local
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

    def counting(parts: Parts, on_message: Callable[[str], None]) -> Parts:
        warm = warm_up(parts, on_message)
        graphs.append(counters["stats"]["unique_graphs"])
        return warm

    monkeypatch.setattr(local, "warm_up", counting)
    torch.compiler.reset()
    config = preset(
        name, env, total_frames=6_000, compile="on", out=str(tmp_path / "run"), **settings
    )
    result = train(config)
    assert result.metrics["updates"] > 3
    assert graphs[0] > 0, "nothing was compiled, so this test would prove nothing"
    assert counters["stats"]["unique_graphs"] == graphs[0]


@pytest.mark.parametrize("algorithm", [pytest.param("sac", marks=pytest.mark.slow), "impala"])
@pytest.mark.parametrize("wish", ["auto", "on"])
@pytest.mark.filterwarnings("ignore")
def test_a_compiler_that_fails_is_named_and_costs_no_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    algorithm: str,
    wish: str,
) -> None:
    """Such as one without Python's headers. Where the user has not asked, a run goes without it."""
    from torch._dynamo.exc import TorchDynamoException  # noqa: PLC0415 - importing it takes seconds

    def broken(*_: Any, **__: Any) -> Any:
        said = "backend='inductor' raised:\nCppCompileError: C++ compile error\n\nOutput:\n"
        raise TorchDynamoException(said + "a.cpp:1:10: fatal error: Python.h: No such file\n1 |")

    def failing(function: Callable[..., Any], *, disable: bool = False, **_: Any) -> Any:
        return function if disable else broken

    monkeypatch.setattr(torch, "compile", failing)
    monkeypatch.setattr(compute, "_pays_on_cpu", lambda *_: True)
    out = tmp_path / "run"
    config = preset(
        {"sac": "sac-control", "impala": "catch"}[algorithm],
        {"sac": "pointmass", "impala": "catch"}[algorithm],
        total_frames=4_000,
        compile=wish,
        out=str(out),
        device="cpu",
    )
    said = r"cannot be compiled here \(a.cpp:1:10: fatal error: Python.h: No such file\)"
    if wish == "on":
        with pytest.raises(ConfigError, match=rf"{said}: mend that, or train without by --compile"):
            train(config)
        return
    with caplog.at_level(logging.INFO, "headrace"):
        result = train(config)
    assert result.finished
    assert result.metrics["updates"] > 3
    assert re.search(rf"{said}, so they run as they are", caplog.text)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_update_of_sac_is_the_eager_one(order: str) -> None:
    config = preset(
        "sac-control",
        "pointmass",
        precision="float32",
        seed=2,  # where no gradient is so near 0 that Adam makes a step of its rounding
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
