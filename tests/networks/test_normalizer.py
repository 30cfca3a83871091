"""Statistics of observations: what they are of, and that they go where weights go."""

from __future__ import annotations

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch

from headrace.networks import models
from headrace.networks.models import NetworkConfig
from headrace.networks.normalizer import ObservationNormalizer, Observer
from headrace.records import PolicyInput
from headrace.specs import EnvSpec

CONFIG = NetworkConfig(normalize_observations=True)


def make_spec(*shape: int, dtype: type = np.float32, stack: int = 3) -> EnvSpec:
    return EnvSpec(
        name="Test-v0",
        observation_space=gym.spaces.Box(0, 255, shape, dtype),
        action_space=gym.spaces.Discrete(3),
        frame_stack=stack,
    )


def inputs_of(observation: torch.Tensor) -> PolicyInput:
    shape = observation.shape[:2]
    return PolicyInput(
        observation, torch.zeros(shape), torch.full(shape, -1), torch.zeros(shape).bool()
    )


def test_statistics_are_those_of_all_single_frames() -> None:
    normalizer = ObservationNormalizer((2, 3))
    batches = [torch.randn(4, 5, 2, 3) * 7 + 3, torch.randn(1, 5, 2, 3) - 40]
    for batch in batches:
        normalizer.observe(batch)
    rows = torch.cat([batch.flatten(0, 1) for batch in batches]).double()
    torch.testing.assert_close(normalizer.mean, rows.mean(dim=0))
    torch.testing.assert_close(normalizer.variance, rows.var(dim=0, correction=0))
    assert normalizer.total == 25
    stacked = torch.randn(6, 4, 2, 3)
    expected = (stacked.double() - normalizer.mean) / normalizer.variance.sqrt()
    torch.testing.assert_close(normalizer(stacked), expected.float().clamp(-10, 10))


def test_the_network_sees_normalised_floats() -> None:
    spec = make_spec(4)
    model = models.mlp(spec, CONFIG)
    plain = models.mlp(spec, NetworkConfig())
    plain.load_state_dict(model.state_dict(), strict=False)
    observation = torch.rand(5, 2, 3, 4)
    torch.testing.assert_close(
        model(inputs_of(observation), ())[0], plain(inputs_of(observation), ())[0]
    )
    model.observe(1000 + 50 * torch.randn(500, 4))
    far = 1000 + 50 * observation
    assert model.normalizer is not None
    expected, _ = plain(inputs_of(model.normalizer(far)), ())
    torch.testing.assert_close(model(inputs_of(far), ())[0], expected)


def test_bytes_are_never_normalised() -> None:
    model = models.nature(make_spec(36, 36, dtype=np.uint8), CONFIG)
    assert model.normalizer is None
    model.observe(torch.zeros(2, 36, 36, dtype=torch.uint8))


def test_statistics_go_wherever_weights_go() -> None:
    model = models.mlp(make_spec(4), CONFIG)
    server = copy.deepcopy(model)
    models.lower_precision(server, torch.bfloat16)
    model.observe(torch.randn(100, 4) * 1e-3 + 5)
    targets = [*server.parameters(), *server.buffers()]
    with torch.no_grad():  # as weights are published
        torch._foreach_copy_(targets, [*model.parameters(), *model.buffers()])
    observation = torch.randn(2, 3, 3, 4) * 1e-3 + 5
    assert torch.equal(
        model(inputs_of(observation), ())[0].value, server(inputs_of(observation), ())[0].value
    )
    loaded = models.mlp(make_spec(4), CONFIG)
    loaded.load_state_dict(model.state_dict())
    assert loaded.normalizer is not None
    assert loaded.normalizer.total == 100


def test_observing_is_seen_by_a_compiled_network() -> None:
    model = models.mlp(make_spec(4), CONFIG)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    observation = torch.randn(2, 3, 3, 4)
    before = compiled(inputs_of(observation), ())[0].value
    model.observe(torch.randn(50, 4) * 9)
    after = compiled(inputs_of(observation), ())[0].value
    assert not torch.equal(before, after)
    assert torch.equal(after, model(inputs_of(observation), ())[0].value)


@pytest.mark.parametrize("config", [CONFIG, NetworkConfig()])
def test_every_network_may_be_told(config: NetworkConfig) -> None:
    model = models.mlp(make_spec(4), config)
    assert isinstance(model, Observer)
    model.observe(torch.zeros(2, 4))
