"""Actor and critics: the batched critics beside one by one, what is shared, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace import tree
from headrace.errors import ConfigError
from headrace.networks import models
from headrace.networks.actor_critics import ActorCriticsNet
from headrace.networks.models import NetworkConfig, lower_precision
from headrace.networks.r2d2 import r2d2
from headrace.networks.structured import StructuredTorso, structured
from headrace.networks.torsos import ConvTorso
from headrace.records import PolicyInput
from headrace.specs import EnvSpec

U, B, D = 3, 4, 2
Builder = Callable[[EnvSpec, NetworkConfig], nn.Module]


def make_spec(space: gym.spaces.Space[Any], *, stack: int = 1, actions: Any = None) -> EnvSpec:
    nested = isinstance(space, gym.spaces.Dict)
    return EnvSpec(
        name="Test-v0",
        observation_space=tree.packed_space(space) if nested else space,
        action_space=gym.spaces.Box(-1, 3, (D,), np.float32) if actions is None else actions,
        frame_stack=stack,
        structure=space if nested else None,
    )


CAMERA = gym.spaces.Box(0, 255, (40, 36, 3), np.uint8)
POSITION = gym.spaces.Box(-5, 5, (3,), np.float32)
IMAGES = make_spec(gym.spaces.Box(0, 255, (84, 84), np.uint8), stack=4)
VECTORS = make_spec(gym.spaces.Box(-9, 9, (8,), np.float32), stack=2)
BYTES = make_spec(gym.spaces.Box(0, 255, (6,), np.uint8))
NESTED = make_spec(gym.spaces.Dict({"camera": CAMERA, "position": POSITION}))
BUILDERS = pytest.mark.parametrize(
    ("builder", "spec"),
    [
        pytest.param(models.nature, IMAGES, id="nature"),
        pytest.param(models.impala_deep, IMAGES, id="impala_deep"),
        pytest.param(models.mlp, VECTORS, id="mlp"),
        pytest.param(models.mlp, BYTES, id="bytes"),
        pytest.param(structured, NESTED, id="structured"),
    ],
)


def make(builder: Builder, spec: EnvSpec, **settings: Any) -> ActorCriticsNet:
    model = builder(spec, NetworkConfig(heads="actor_critics", **settings))
    assert isinstance(model, ActorCriticsNet)
    return model


def observations(spec: EnvSpec, *leading: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (*leading, *spec.stacked_shape)
    if spec.structure is not None:
        spec.structure.seed(0)
        rows = np.zeros((math.prod(leading) * spec.frame_stack, shape[-1]), np.uint8)
        for row in rows:
            tree.pack(tree.leaves(spec.structure), spec.structure.sample(), row)
        return torch.from_numpy(rows).view(shape)
    if spec.observation_space.dtype == np.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return torch.randn(shape, generator=generator)


def one_by_one(
    model: ActorCriticsNet, rows: Tensor, action: Tensor, masks: tuple[Tensor, ...]
) -> Tensor:
    """Q [N, B] of vectors in float64, each critic by itself, its layers as PyTorch has them."""
    critics = model.critics
    values = []
    for n in range(len(critics.weights[0])):
        x = torch.cat((rows.flatten(1), action.tanh()), dim=1).double()
        for index, (weight, bias) in enumerate(zip(critics.weights, critics.biases, strict=True)):
            x = F.linear(x, weight[n].double().T, bias[n, 0].double())
            if index == len(critics.weights) - 1:
                continue
            if masks:
                x = x * masks[index][n]
            if critics.gains is not None and critics.shifts is not None:
                gain, shift = critics.gains[index][n, 0], critics.shifts[index][n, 0]
                x = F.layer_norm(x, x.shape[-1:], gain.double(), shift.double())
            x = x.relu() if critics.activation == "relu" else x.tanh()
        values.append(x[:, 0])
    return torch.stack(values)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_batched_critics_are_critics_one_by_one(
    count: int, dropout: float, layer_norm: bool, activation: Any
) -> None:
    model = make(
        models.mlp,
        VECTORS,
        hidden_sizes=(16, 7),
        num_critics=count,
        critic_dropout=dropout,
        critic_layer_norm=layer_norm,
        activation=activation,
    )
    for parameters in (model.critics.gains, model.critics.shifts):
        for param in parameters or ():
            nn.init.normal_(param)
    rows, action = observations(VECTORS, B), torch.randn(B, D)
    masks = model.critics.dropout_masks(B, torch.Generator().manual_seed(0))
    assert [x.shape for x in masks] == ([(count, B, 16), (count, B, 7)] if dropout else [])
    q_NB = model.critics(rows, action, masks)
    assert q_NB.shape == (count, B)
    expected = one_by_one(model, rows, action, masks).float()
    torch.testing.assert_close(q_NB, expected, atol=1e-5, rtol=1e-4)
    if dropout:
        assert not torch.allclose(q_NB, model.critics(rows, action))
    assert (q_NB.unsqueeze(1) != q_NB).any(dim=-1).sum() == count * (count - 1), "alike"
    assert torch.equal(model.q(rows, action), model.critics(rows, action))


def test_layers_start_as_pytorchs_do() -> None:
    model = make(models.mlp, VECTORS, hidden_sizes=(400, 300))
    for index, inputs in enumerate((16 + D, 400, 300)):
        like = nn.Linear(inputs, 300)
        weight, bias = model.critics.weights[index], model.critics.biases[index]
        assert weight.abs().max().item() == pytest.approx(inputs**-0.5, rel=0.05)
        assert bias.abs().max() <= inputs**-0.5
        if index < 2:
            assert weight.std().item() == pytest.approx(like.weight.std().item(), rel=0.05)
            assert bias.std().item() == pytest.approx(like.bias.std().item(), rel=0.15)


def test_what_dropout_keeps_is_raised_so_that_means_stay() -> None:
    model = make(models.mlp, VECTORS, hidden_sizes=(50,), critic_dropout=0.2)
    generator = torch.Generator().manual_seed(0)
    (mask,) = model.critics.dropout_masks(400, generator)
    assert mask.unique().tolist() == pytest.approx([0.0, 1.25])
    assert mask.mean().item() == pytest.approx(1.0, abs=0.02)
    assert not torch.equal(model.critics.dropout_masks(400, generator)[0], mask)


@BUILDERS
def test_every_builder_makes_an_actor_and_critics_apart(builder: Builder, spec: EnvSpec) -> None:
    model = make(builder, spec, hidden_sizes=(32, 32))
    assert model.initial_state(B) == ()
    observation = observations(spec, U, B)
    zeros = torch.zeros(U, B)
    inputs = PolicyInput(observation, zeros, torch.zeros(U, B, D), zeros.bool())
    output, state = model(inputs, ())
    assert state == ()
    assert output.parameters.shape == (U, B, 2 * D)
    assert output.parameters.dtype == torch.float32
    assert torch.equal(output.value, zeros)
    mean, log_std = output.parameters.chunk(2, dim=-1)
    assert mean.abs().max() < 0.2, "does not start in the middle"
    assert log_std.abs().max() < 0.2, "does not start near initial_log_std"
    assert log_std.std() > 0, "the deviation does not depend on the observation"
    output.parameters.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.actor.parameters())
    assert all(p.grad is None for p in model.critics.parameters())
    model.zero_grad(set_to_none=True)
    q_NB = model.q(observation[0], torch.randn(B, D))
    (q_NB - 1).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.critics.parameters())
    assert all(p.grad is None for p in model.actor.parameters())


def test_the_actor_starts_as_wide_as_it_is_told() -> None:
    model = make(models.mlp, VECTORS, initial_log_std=-1.5)
    log_std = model.actor(observations(VECTORS, B)).chunk(2, dim=-1)[1]
    assert log_std.mean().item() == pytest.approx(-1.5, abs=0.1)


def test_critics_of_images_share_a_torso_that_is_not_the_actors() -> None:
    model = make(models.nature, IMAGES, num_critics=3)
    assert isinstance(model.critics.torso, ConvTorso)
    assert model.critics.torso is not model.actor.torso
    assert model.critics.weights[0].shape == (3, 512 + D, 64)
    nested = make(structured, NESTED)
    assert isinstance(nested.critics.torso, StructuredTorso)
    assert make(models.mlp, VECTORS).critics.torso is None


def test_both_sides_see_bytes_alike() -> None:
    model = make(models.mlp, BYTES)
    rows, action = observations(BYTES, B), torch.randn(B, D)
    expected = one_by_one(model, rows / 255, action, ()).float()
    torch.testing.assert_close(model.q(rows, action), expected, atol=1e-5, rtol=1e-4)


def test_observations_are_normalised_for_both_sides() -> None:
    model = make(models.mlp, VECTORS, normalize_observations=True)
    frames = 50 + 10 * torch.randn(1000, 8)
    model.observe(frames)
    rows = observations(VECTORS, B)
    assert model.normalizer is not None
    torch.testing.assert_close(model.rows(50 + 10 * rows), rows, atol=0.3, rtol=0.1)
    action = torch.randn(B, D)
    expected = one_by_one(model, model.rows(rows), action, ()).float()
    torch.testing.assert_close(model.q(rows, action), expected, atol=1e-5, rtol=1e-4)
    nested = make(structured, NESTED, normalize_observations=True)
    nested.observe(observations(NESTED, B)[:, -1])
    for torso in (nested.actor.torso, nested.critics.torso):
        assert isinstance(torso, StructuredTorso)
        assert torso.normalizer is not None
        assert torso.normalizer.total == B


@BUILDERS
def test_low_precision_leaves_all_of_it(builder: Builder, spec: EnvSpec) -> None:
    model = make(builder, spec)
    lower_precision(model, torch.bfloat16)
    assert {x.dtype for x in model.parameters()} == {torch.float32}


def test_what_does_not_go_together_is_refused() -> None:
    for actions in (gym.spaces.Discrete(3), gym.spaces.MultiDiscrete([3, 2])):
        spec = make_spec(VECTORS.observation_space, actions=actions)
        with pytest.raises(ConfigError, match=r"Test-v0: .*continuous actions, not .*r2d2, impala"):
            make(models.mlp, spec)
    with pytest.raises(ConfigError, match="no LSTM, and lstm_size is 8"):
        make(models.mlp, VECTORS, lstm_size=8)
    with pytest.raises(ConfigError, match="no LSTM, and lstm_size is 512"):
        make(r2d2, VECTORS)
    with pytest.raises(ConfigError, match="not with heads actor_critics"):
        NetworkConfig(heads="actor_critics", separate_value=True)
    for settings in ({"num_critics": 0}, {"critic_dropout": 1.0}, {"critic_dropout": -0.1}):
        with pytest.raises(ConfigError, match="num_critics must be at least 1"):
            NetworkConfig(heads="actor_critics", **settings)  # type: ignore[arg-type]


def test_statistics_are_kept_where_each_side_lies() -> None:
    """Actor and critics may learn on two devices, and frames come to one."""

    class Watching(nn.Flatten):
        seen: torch.device | None = None

        def observe(self, frames: Tensor) -> None:
            self.seen = frames.device

    spec = make_spec(gym.spaces.Box(-9, 9, (3,), np.float32))
    model = ActorCriticsNet(Watching, 3, spec, NetworkConfig(heads="actor_critics"))
    model.critics.to("meta")
    model.observe(torch.zeros(2, 3))
    assert isinstance(model.actor.torso, Watching)
    assert isinstance(model.critics.torso, Watching)
    assert model.actor.torso.seen == torch.device("cpu")
    assert model.critics.torso.seen == torch.device("meta")
