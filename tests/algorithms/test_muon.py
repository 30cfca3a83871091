"""Muon against the singular values that its iteration is about, and what it steps."""

from __future__ import annotations

import copy
import dataclasses
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headrace.algorithms.muon import orthogonalized
from headrace.algorithms.optimizers import (
    OptimizerConfig,
    hidden_weights,
    load_optimizer,
    make_optimizer,
)
from headrace.errors import ConfigError
from headrace.networks import models
from headrace.networks.config import NetworkConfig
from headrace.specs import EnvSpec

CONFIG = OptimizerConfig(optimizer="muon", learning_rate=0.01, muon_momentum=0.9)
SPEC = EnvSpec(
    name="images",
    observation_space=gym.spaces.Box(0, 255, (40, 40), np.uint8),
    action_space=gym.spaces.Discrete(18),
    frame_stack=4,
)


def by_singular_values(matrix: Tensor) -> Tensor:
    """The iteration on every singular value, which is all that it changes."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (16, 16), (256, 2592), (1, 7)])
def test_every_singular_value_becomes_about_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    near = orthogonalized(matrix)
    torch.testing.assert_close(near.double(), by_singular_values(matrix), atol=1e-4, rtol=1e-4)
    # A square matrix of noise has singular values near zero, which five steps do not lift so far.
    values = torch.linalg.svdvals(near)[: max(1, min(shape) * 3 // 4)]
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize("rank", [1, 2, 30])
def test_a_gradient_of_few_directions_stays_in_them(rank: int) -> None:
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.randn(size, rank, generator=generator) for size in (256, 1152))
    near = orthogonalized(left @ right.t())
    torch.testing.assert_close(
        near.double(), by_singular_values(left @ right.t()), atol=2e-4, rtol=1e-3
    )


def test_a_gradient_of_nothing_takes_no_step() -> None:
    assert not orthogonalized(torch.zeros(3, 4)).any()


@pytest.mark.parametrize("shape", [(6, 2, 3, 3), (40, 5)], ids=["wide", "tall"])
def test_a_step_is_its_formula(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator).requires_grad_()
    longer = max(shape[0], math.prod(shape[1:]))
    bias = torch.zeros(6, requires_grad=True)
    optimizer = make_optimizer([weight, bias], CONFIG, hidden=[weight])
    twin = bias.detach().clone().requires_grad_()
    adam = torch.optim.Adam([twin], lr=0.01, eps=CONFIG.optimizer_eps)
    wanted, mean = weight.detach().double(), torch.zeros(shape, dtype=torch.float64)
    for _ in range(3):
        weight.grad = torch.randn(shape, generator=generator)
        bias.grad = torch.randn(6, generator=generator)
        twin.grad = bias.grad.clone()
        optimizer.step()
        adam.step()
        mean = 0.9 * mean + 0.1 * weight.grad
        ahead = 0.1 * weight.grad + 0.9 * mean
        # As long as one of Adam's, 0.2 learning rates in every entry, were all values one.
        wanted -= 0.01 * 0.2 * longer**0.5 * by_singular_values(ahead.flatten(1)).view(shape)
        torch.testing.assert_close(weight.detach().double(), wanted, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(bias, twin)


def test_what_has_no_gradient_stays_and_a_closure_is_refused() -> None:
    weight, bias = torch.ones(2, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = make_optimizer([weight, bias], CONFIG, hidden=[weight])
    optimizer.step()
    assert not optimizer.state
    assert weight.eq(1).all()
    assert bias.eq(1).all()
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)


@pytest.mark.parametrize("network", ["impala_shallow", "impala_deep", "mlp"])
def test_convolutions_and_layers_are_hidden_and_heads_are_not(network: str) -> None:
    spec = SPEC if network != "mlp" else dataclasses.replace(SPEC, frame_stack=1)
    model = getattr(models, network)(spec, NetworkConfig(lstm_size=8))
    hidden = {id(weight) for weight in hidden_weights(model)}
    for name, param in model.named_parameters():
        is_weight = name.startswith("torso.") and param.ndim >= 2
        assert (id(param) in hidden) == is_weight, name


def test_hidden_layers_of_action_values_are_not_heads() -> None:
    model = models.impala_shallow(SPEC, NetworkConfig(heads="duelling"))
    hidden = {id(weight) for weight in hidden_weights(model)}
    names = {name for name, param in model.named_parameters() if id(param) in hidden}
    heads = {name for name in names if not name.startswith("torso.")}
    assert heads == {"head.value.0.weight", "head.advantage.0.weight"}


def test_weights_that_two_layers_share_or_that_are_made_are_stepped_once() -> None:
    first, second, made = (nn.Linear(3, 3, bias=False) for _ in range(3))
    second.weight = first.weight
    nn.utils.parametrizations.weight_norm(made)
    model = nn.Sequential(first, second, made)
    hidden = hidden_weights(model)
    assert [id(weight) for weight in hidden] == [id(first.weight)]
    optimizer = make_optimizer(model.parameters(), CONFIG, hidden=hidden)
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    params = [param for group in optimizer.param_groups for param in group["params"]]
    assert len({id(param) for param in params}) == len(params) == 3


def test_all_may_be_hidden_and_none_is_refused() -> None:
    layer = nn.Linear(3, 3, bias=False)
    layer.weight.grad = torch.randn(3, 3)
    before = layer.weight.detach().clone()
    make_optimizer(layer.parameters(), CONFIG, hidden=hidden_weights(layer)).step()
    assert not torch.equal(layer.weight, before)
    with pytest.raises(ConfigError, match="--optimizer adam"):
        make_optimizer([torch.zeros(3)], CONFIG)


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_a_mean_that_never_moves_is_refused(momentum: float) -> None:
    with pytest.raises(ConfigError, match="muon_momentum"):
        OptimizerConfig(optimizer="muon", muon_momentum=momentum)


def test_saved_moments_go_on() -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        x = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    one, other = net(), net()
    first, second = (
        make_optimizer(model.parameters(), CONFIG, hidden=hidden_weights(model))
        for model in (one, other)
    )
    step(one, first, 0)
    other.load_state_dict(one.state_dict())
    load_optimizer(second, copy.deepcopy(first.state_dict()))
    for model, optimizer in ((one, first), (other, second)):
        step(model, optimizer, 1)
        step(model, optimizer, 2)
    torch.testing.assert_close(other.state_dict(), one.state_dict(), atol=0, rtol=0)
    # Adam's moments of everything are not Muon's: all starts anew.
    adam = make_optimizer(one.parameters(), OptimizerConfig())
    step(one, adam, 3)
    load_optimizer(first, adam.state_dict())
    assert not first.state
