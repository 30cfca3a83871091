"""Statistics of observations: what they are of, and that they go where weights go."""

from __future__ import annotations

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from headrace.networks import models
from headrace.networks.models import NetworkConfig
from headrace.networks.normalizer import ObservationNormalizer, Observer, PixelNormalizer
from headrace.records import PolicyInput
from headrace.specs import EnvSpec
from headrace.weights import acting_tensors

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


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    """Frames whose pixels differ in mean and deviation; some never change."""
    rng = np.random.default_rng(seed)
    mean, spread = rng.uniform(0, 255, shape[-2:]), rng.uniform(0, 40, shape[-2:])
    spread[: shape[-2] // 2] = 0.0
    frames = rng.normal(mean, spread, shape).round().clip(0, 255)
    return torch.from_numpy(frames.astype(np.uint8))


def test_statistics_of_images_are_those_of_two_passes() -> None:
    normalizer = PixelNormalizer((9, 7))
    frames = images(700, 9, 7)  # more than are summed at a time
    for start, end in ((0, 3), (3, 303), (303, 700)):
        normalizer.observe(frames[start:end].reshape(end - start, 1, 9, 7))
    rows = frames.numpy().astype(np.float64)
    assert normalizer.total == 700
    np.testing.assert_allclose(normalizer.mean.numpy(), rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(normalizer.variance.numpy(), rows.var(axis=0), atol=1e-9)
    new = images(5, 9, 7, seed=1)
    deviation = np.sqrt(rows.var(axis=0) + 1e-5 * 255**2)
    expected = ((new.numpy() - rows.mean(axis=0)) / deviation).clip(-5, 5)
    np.testing.assert_allclose(normalizer(new).numpy(), expected, atol=1e-5)


def test_before_anything_was_seen_numbers_stay_and_bytes_are_scaled() -> None:
    numbers = torch.tensor([[-1e6, 0.5, 1e6]])
    torch.testing.assert_close(ObservationNormalizer((3,))(numbers), numbers)
    frames = images(2, 4, 4)
    torch.testing.assert_close(PixelNormalizer((4, 4))(frames), frames / 255)


@pytest.mark.parametrize("name", ["nature", "impala_shallow", "impala_deep", "football"])
@pytest.mark.parametrize("colours", [(), (3,)], ids=["grey", "colours"])
def test_a_normalised_image_network_is_the_plain_one_on_normalised_frames(
    name: str, colours: tuple[int, ...]
) -> None:
    spec = make_spec(40, 36, *colours, dtype=np.uint8, stack=2)
    model = getattr(models, name)(spec, CONFIG)
    frames = images(30, *colours, 40, 36)
    frames = frames.movedim(1, -1) if colours else frames
    model.observe(frames)
    torso = model.torso
    stacks = frames[:10].unflatten(0, (5, 2))
    # The first layer by its definition: a convolution of floats, channels as they are stacked.
    plain = torso.normalizer(stacks)
    plain = plain.permute(0, 1, 4, 2, 3).flatten(1, 2) if colours else plain
    conv = torso.convs[0]
    expected = F.conv2d(plain, conv.weight, conv.bias, conv.stride, conv.padding)
    merged = stacks.permute(0, 1, 4, 2, 3).flatten(1, 2) if colours else stacks
    torch.testing.assert_close(conv(merged, torso.normalizer), expected, atol=5e-6, rtol=1e-5)
    with torch.no_grad():
        low = copy.deepcopy(conv).bfloat16()(merged, torso.normalizer)
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(low.float(), expected, atol=0.02 * scale, rtol=0.05)


def test_small_images_and_bytes_are_normalised_before_an_mlp() -> None:
    model = models.mlp(make_spec(6, dtype=np.uint8), CONFIG)
    assert isinstance(model.normalizer, PixelNormalizer)
    assert model.torso.scale == 1.0
    integers = models.mlp(make_spec(6, dtype=np.int64), CONFIG)
    assert type(integers.normalizer) is ObservationNormalizer
    integers.observe(torch.arange(60).reshape(10, 6))
    assert integers.normalizer.mean.tolist() == [27, 28, 29, 30, 31, 32]


def test_a_network_of_the_users_is_given_normalised_images() -> None:
    class Torso(nn.Module):
        def forward(self, observation: torch.Tensor) -> torch.Tensor:
            return observation.flatten(1).mean(dim=1, keepdim=True).expand(-1, 4)

    model = models.assemble(Torso, 4, make_spec(36, 36, dtype=np.uint8), CONFIG)
    assert isinstance(model.normalizer, PixelNormalizer)


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


def test_what_is_kept_of_statistics_is_renewed_when_they_change() -> None:
    shown = images(6, 40, 40, seed=2).view(6, 1, 40, 40)
    conv = models.nature(make_spec(40, 40, dtype=np.uint8), CONFIG).torso.convs[0]

    def see(normalizer: PixelNormalizer) -> torch.Tensor:
        """As it is, after asking that a fresh normaliser with these statistics sees the same."""
        fresh = PixelNormalizer((40, 40))
        fresh.load_state_dict(normalizer.state_dict())
        frames = shown.expand(-1, conv.in_channels, -1, -1)
        with torch.no_grad():
            seen = conv(frames, normalizer)
            assert torch.equal(seen, conv(frames, fresh))
        return seen

    normalizer = PixelNormalizer((40, 40))
    before = see(normalizer)
    normalizer.observe(images(50, 40, 40))
    after = see(normalizer)
    assert not torch.equal(before, after)
    # A copy has statistics of its own, and they may have changed just as often.
    twin = copy.deepcopy(normalizer)
    other = images(50, 40, 40, seed=1)
    for _ in range(4):
        for one in (twin, pickle.loads(pickle.dumps(twin))):
            one.observe(other)
            assert not torch.equal(see(one), after)
    assert torch.equal(see(normalizer), after)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_statistics_of_images_go_wherever_weights_go(precision: torch.dtype) -> None:
    model = models.nature(make_spec(40, 40, dtype=np.uint8), CONFIG)
    server = copy.deepcopy(model)
    models.lower_precision(server, precision)
    model.observe(images(50, 40, 40))
    with torch.no_grad():  # as weights are published
        torch._foreach_copy_(acting_tensors(server), acting_tensors(model))
    observation = images(6, 40, 40, seed=2).view(2, 1, 3, 40, 40)
    kept = server.torso.normalizer
    assert kept.mean.dtype == torch.float64
    assert torch.equal(kept.variance, model.torso.normalizer.variance)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision != torch.float32):
        learner, acting = (net(inputs_of(observation), ())[0].value for net in (model, server))
    torch.testing.assert_close(acting, learner, rtol=0.02, atol=0.02)
    if precision == torch.float32:
        assert torch.equal(acting, learner)
    loaded = models.nature(make_spec(40, 40, dtype=np.uint8), CONFIG)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(
        loaded(inputs_of(observation), ())[0].value, model(inputs_of(observation), ())[0].value
    )


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
