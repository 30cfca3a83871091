"""The scale of values and its inverse, against each other and against the published forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from headrace.ops.value_scale import rescale, unrescale

EPSILONS = [0.0, 1e-3, 1e-2]


def twelve_decades() -> Tensor:
    size = torch.logspace(-6, 6, 4001, dtype=torch.float64).float()
    return torch.cat((-size.flip(0), torch.zeros(1), size))


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_the_inverse_is_exact_over_twelve_decades_of_either_sign(epsilon: float) -> None:
    x = twelve_decades()
    for there, back in ((rescale, unrescale), (unrescale, rescale)):
        again = back(there(x, epsilon), epsilon)
        assert again.dtype == torch.float32
        torch.testing.assert_close(again, x, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("epsilon", [1e-3, 1e-2])
def test_both_are_what_the_papers_write(epsilon: float) -> None:
    for x in (-3e4, -7.5, -0.2, 0.0, 0.3, 1.0, 80.0, 2e5):
        sign = math.copysign(1.0, x)
        h = sign * (math.sqrt(abs(x) + 1) - 1) + epsilon * x
        root = math.sqrt(1 + 4 * epsilon * (abs(x) + 1 + epsilon)) - 1
        inverse = sign * ((root / (2 * epsilon)) ** 2 - 1)
        given = torch.tensor(x, dtype=torch.float64)
        assert rescale(given, epsilon).item() == pytest.approx(h, rel=1e-9)
        assert unrescale(given, epsilon).item() == pytest.approx(inverse, rel=1e-9)


def test_the_default_is_the_published_epsilon() -> None:
    x = twelve_decades()
    assert torch.equal(rescale(x), rescale(x, 1e-3))
    assert torch.equal(unrescale(x), unrescale(x, 1e-3))
    assert rescale(torch.tensor(3.0)).item() == pytest.approx(1.003)


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("scale", [rescale, unrescale])
def test_they_are_odd_and_grow(scale: Callable[..., Tensor], epsilon: float) -> None:
    y = scale(twelve_decades(), epsilon)
    assert (y.diff() > 0).all()
    assert torch.equal(y, -y.flip(0))


def test_the_slope_at_zero_is_finite() -> None:
    x = torch.zeros(3, requires_grad=True)
    rescale(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 0.501))
