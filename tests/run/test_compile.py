"""Compiled runs: everything is compiled before the run's threads start, and nothing after."""

from pathlib import Path
from typing import Any

import pytest
import torch

from headrace import preset, train
from headrace.run import local
from headrace.run.build import Parts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "env", "settings"),
    [
        ("catch", "catch", {}),
        ("r2d2-control", "recall", {"server": {"eval_envs": 8}, "network": {"lstm_size": 8}}),
    ],
    ids=["impala", "r2d2"],
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
