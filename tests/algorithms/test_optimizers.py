"""Optimisers against their formulas, and sums against means."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.algorithms.optimizers import (
    OptimizerConfig,
    RMSpropTF,
    clipped_step,
    learning_rate_at,
    make_optimizer,
)
from headrace.config import from_dict
from headrace.errors import ConfigError
from headrace.presets import PRESETS

SAMPLES = 20 * 32  # T x B of the IMPALA paper


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("initial", [0.0, 1.0])
def test_rmsprop_tf_is_its_formula(momentum: float, initial: float) -> None:
    lr, decay, eps = 0.1, 0.9, 0.01
    param = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    optimizer = RMSpropTF(
        [param], lr=lr, alpha=decay, eps=eps, momentum=momentum, initial_mean_square=initial
    )
    wanted, mean_square, velocity = [1.0, -2.0], [initial] * 2, [0.0] * 2
    for gradient in ([0.5, -3.0], [0.0, 2.0], [-1.5, 1e-4]):
        param.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        for i, g in enumerate(gradient):
            mean_square[i] = decay * mean_square[i] + (1 - decay) * g * g
            velocity[i] = momentum * velocity[i] + lr * g / math.sqrt(mean_square[i] + eps)
            wanted[i] -= velocity[i]
        assert param.tolist() == pytest.approx(wanted, abs=1e-12)


def test_rmsprop_tf_skips_what_has_no_gradient_and_takes_no_closure() -> None:
    param = torch.zeros(1, requires_grad=True)
    optimizer = RMSpropTF(
        [param], lr=1.0, alpha=0.9, eps=0.1, momentum=0.0, initial_mean_square=1.0
    )
    optimizer.step()
    assert param.item() == 0
    assert not optimizer.state
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)


def test_a_saved_rmsprop_tf_goes_on() -> None:
    config = OptimizerConfig(optimizer="rmsprop_tf", initial_mean_square=1.0, momentum=0.5)
    params = [torch.ones(3, requires_grad=True) for _ in range(2)]
    one, other = (make_optimizer([param], config) for param in params)
    params[0].grad = torch.tensor([1.0, 2.0, 3.0])
    one.step()
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    with torch.no_grad():
        params[1].copy_(params[0])
    for param, optimizer in zip(params, (one, other), strict=True):
        param.grad = torch.tensor([-1.0, 0.5, 2.0])
        optimizer.step()
    assert torch.equal(params[0], params[1])


def losses_of(param: Tensor) -> Tensor:
    """One loss per sample, some of them large, so that the clip can bite."""
    x = torch.linspace(-1, 3, SAMPLES * 4, dtype=param.dtype).view(SAMPLES, 4)
    return (x @ param - 0.3).square()


def published_update(name: str, scale: float, *, eps: float, clip: float) -> list[Tensor]:
    """Three updates of a loss that is a sum, with published numbers, written without headrace."""
    param = torch.tensor([0.5, -0.2, 0.1, 0.7], dtype=torch.float64, requires_grad=True)
    optimizer: torch.optim.Optimizer | None = None
    if name == "adam":
        optimizer = torch.optim.Adam([param], lr=6e-4, betas=(0.9, 0.999), eps=eps)
    elif name == "rmsprop":
        optimizer = torch.optim.RMSprop([param], lr=6e-4, alpha=0.99, eps=eps)
    mean_square = torch.ones_like(param)
    after = []
    for _ in range(3):
        param.grad = None
        (scale * losses_of(param).sum()).backward()
        gradient = param.grad
        assert gradient is not None
        gradient *= min(1.0, clip / gradient.norm().item())
        if optimizer is not None:
            optimizer.step()
        else:
            mean_square = 0.99 * mean_square + 0.01 * gradient.square()
            with torch.no_grad():
                param -= 6e-4 * gradient / (mean_square + eps).sqrt()
        after.append(param.detach().clone())
    return after


def our_update(config: OptimizerConfig, scale: float) -> list[Tensor]:
    param = torch.tensor([0.5, -0.2, 0.1, 0.7], dtype=torch.float64, requires_grad=True)
    optimizer = make_optimizer([param], config)
    after = []
    for _ in range(3):
        clipped_step(
            optimizer,
            scale * losses_of(param).mean(),
            learning_rate=learning_rate_at(config, 0.0),
            max_norm=config.max_gradient_norm,
        )
        after.append(param.detach().clone())
    return after


def assert_updates_agree(published: list[Tensor], ours: list[Tensor]) -> None:
    before = torch.tensor([0.5, -0.2, 0.1, 0.7], dtype=torch.float64)
    for wanted, found in zip(published, ours, strict=True):
        assert (wanted - before).abs().max() > 1e-4, "nothing moved"
        # Of the step, not of the weights.
        torch.testing.assert_close(found - before, wanted - before, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["clipped", "free"])
@pytest.mark.parametrize("preset", ["atari", "atari-sticky"])
def test_the_atari_preset_takes_the_papers_update(preset: str, scale: float) -> None:
    # arXiv:1802.01561, Table G.1, of a loss that is a sum over T and B.
    published = published_update("rmsprop_tf", scale, eps=0.01, clip=40.0)
    config = from_dict({"env": "catch", "learning": PRESETS[preset].values["learning"]})
    assert_updates_agree(published, our_update(config.learning.optimizer, scale))


@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["clipped", "free"])
@pytest.mark.parametrize(("name", "eps"), [("adam", 0.5), ("rmsprop", 0.01)])
def test_a_published_sum_is_our_mean_with_eps_and_clip_divided(
    name: str, eps: float, scale: float
) -> None:
    published = published_update(name, scale, eps=eps, clip=40.0)
    config = OptimizerConfig(
        optimizer=name,  # type: ignore[arg-type]
        optimizer_eps=eps / SAMPLES,
        max_gradient_norm=40.0 / SAMPLES,
    )
    assert_updates_agree(published, our_update(config, scale))


def test_the_scales_above_are_on_both_sides_of_the_clip() -> None:
    param = torch.tensor([0.5, -0.2, 0.1, 0.7], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(losses_of(param).sum(), param)
    assert gradient.norm() > 80
    assert gradient.norm() * 1e-3 < 20


@pytest.mark.parametrize(
    ("max_norm", "wanted"), [(0.0, [3.0, 4.0]), (10.0, [3.0, 4.0]), (1.0, [0.6, 0.8])]
)
def test_the_clip_keeps_the_direction_and_reports_the_norm_before(
    max_norm: float, wanted: list[float]
) -> None:
    a, b = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    unused = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([a, b, unused], lr=99.0)
    norm = clipped_step(optimizer, (3 * a + 4 * b).sum(), learning_rate=1.0, max_norm=max_norm)
    assert norm.item() == pytest.approx(5.0)
    assert [-a.item(), -b.item()] == pytest.approx(wanted)
    assert unused.grad is None


def test_gradients_of_an_earlier_step_do_not_add_up() -> None:
    a = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([a], lr=1.0)
    for _ in range(2):
        clipped_step(optimizer, a.sum(), learning_rate=1.0, max_norm=0.0)
    assert a.item() == -2


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    a = torch.zeros(1, requires_grad=True)
    norm = clipped_step(
        torch.optim.SGD([a]), (a * torch.nan).sum(), learning_rate=1.0, max_norm=1.0
    )
    assert not torch.isfinite(norm)


def test_the_learning_rate_falls_in_a_line_to_zero() -> None:
    config = OptimizerConfig(learning_rate=0.5, learning_rate_schedule="linear")
    rates = [learning_rate_at(config, progress) for progress in (0.0, 0.25, 0.5, 1.0, 1.5)]
    assert rates == [0.5, 0.375, 0.25, 0.0, 0.0]
    constant = OptimizerConfig(learning_rate=0.5, learning_rate_schedule="constant")
    assert learning_rate_at(constant, 0.9) == 0.5


def test_the_learning_rate_rises_stays_and_falls() -> None:
    config = OptimizerConfig(
        learning_rate=0.5, learning_rate_warmup=0.125, learning_rate_decay=0.25
    )
    progress = (0.0, 0.0625, 0.125, 0.5, 0.75, 0.875, 1.0, 1.5)
    rates = [learning_rate_at(config, done) for done in progress]
    assert rates == [0.0, 0.25, 0.5, 0.5, 0.5, 0.25, 0.0, 0.0]
    constant = OptimizerConfig(learning_rate_schedule="constant", learning_rate_warmup=0.5)
    assert learning_rate_at(constant, 0.25) == constant.learning_rate / 2
    assert learning_rate_at(constant, 0.9) == constant.learning_rate


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate_warmup": 1.0},
        {"learning_rate_warmup": -0.1},
        {"learning_rate_decay": 0.0},
        {"learning_rate_decay": 1.1},
    ],
)
def test_what_is_no_share_of_a_run_is_refused(settings: Any) -> None:
    with pytest.raises(ConfigError, match="learning_rate_decay"):
        OptimizerConfig(**settings)


@pytest.mark.parametrize("name", ["learning_rate", "optimizer_eps", "max_gradient_norm"])
def test_negative_settings_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        OptimizerConfig(**{name: -1.0})
