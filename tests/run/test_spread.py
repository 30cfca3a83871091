"""Where environments end their unrolls in different steps, and where they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headrace import make_config
from headrace.algorithms.base import ExperienceSpec
from headrace.catalog import environment_family
from headrace.config import RunConfig
from headrace.run.build import make_learning
from headrace.run.experience import make_unrolls, spreads_ends


def experience_of(config: RunConfig) -> ExperienceSpec:
    """How the config's algorithm cuts the stream."""
    spec = environment_family(config.env).spec(config.env, config.environment)
    return make_learning(config, spec)[2].experience


@pytest.mark.parametrize(
    ("settings", "spread"),
    [
        ({}, True),
        ({"inference": "worker"}, True),
        ({"listen": "127.0.0.1:0"}, True),
        ({"spread_unrolls": False}, False),
        ({"batch_unrolls": 64}, False),  # a batch of all environments
        ({"lockstep": True}, False),
        ({"turns": "on"}, False),
        ({"pool": "device"}, False),
        ({"algorithm": "ppo", "batch_unrolls": 4, "minibatches": 1}, False),  # takes turns
        ({"algorithm": "r2d2"}, False),
    ],
)
def test_only_where_server_and_learner_would_wait_in_turn(
    settings: dict[str, Any], spread: bool
) -> None:
    config = make_config("catch", **settings)
    assert spreads_ends(config, experience_of(config)) is spread


@pytest.mark.parametrize("spread", [True, False])
def test_the_servers_table_is_told(spread: bool) -> None:
    config = make_config("catch", spread_unrolls=spread)
    spec = environment_family("catch").spec("catch", config.environment)
    _, model, algorithm = make_learning(config, spec)
    _, unrolls = make_unrolls(config, algorithm, spec, model, 32, torch.device("cpu"))
    assert unrolls.spreads_ends is spread
