"""The squashed normal against numerical integration, Monte Carlo and torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from headrace.ops.squashed_normal import LOG_STD_RANGE, SquashedNormal, log_slope

UNIT = SquashedNormal((-1.0,), (1.0,))
GRID = [(0.0, 0.0), (0.4, -1.5), (-1.2, 0.7), (3.0, -0.5), (0.1, 2.0), (8.0, -3.0)]


def parameters(mean: float, log_std: float) -> Tensor:
    return torch.tensor([mean, log_std], dtype=torch.float64)


def density(mean: float, log_std: float, points: int = 400_001) -> tuple[Tensor, Tensor, float]:
    """Pre-squash grid, log-density of the squashed value there, and the step of the grid."""
    std = math.exp(log_std)
    u = torch.linspace(mean - 10 * std, mean + 10 * std, points, dtype=torch.float64)
    log_density = UNIT.log_prob(parameters(mean, log_std).expand(points, 2), u[:, None])
    return u, log_density, 20 * std / (points - 1)


@pytest.mark.parametrize(("mean", "log_std"), GRID)
def test_the_density_integrates_to_one(mean: float, log_std: float) -> None:
    u, log_density, step = density(mean, log_std)
    # d tanh(u) = du / cosh(u)^2
    total = (log_density.exp() / u.cosh() ** 2 * step).sum()
    assert total.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (0.4, 0.7), (4.0, -0.5), (-4.0, -0.5)])
@pytest.mark.parametrize("squashed", [-0.9999, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_density_at_the_edge_is_the_slope_of_the_probability(
    squashed: float, mean: float, log_std: float, dtype: torch.dtype
) -> None:
    """Integrated over a sliver of [-1, 1], it is what the normal gives to that sliver before the
    squash; and so in the float32 of training, where tanh has few numbers left."""
    y = torch.linspace(squashed - 5e-5, squashed + 5e-5, 20_001, dtype=torch.float64)
    u = y.atanh()
    row = parameters(mean, log_std).to(dtype).expand(len(u), 2)
    density = UNIT.log_prob(row, u.to(dtype)[:, None]).double().exp()
    edges = (torch.stack((u[0], u[-1])) - mean) / math.exp(log_std) / math.sqrt(2)
    # erfc of the nearer tail, since differences of numbers close to 1 have few digits.
    low, high = torch.special.erfc(edges.sign() * edges) * edges.sign()
    expected = 0.5 * (low - high).abs()
    total = torch.trapezoid(density, y)
    assert total.item() == pytest.approx(
        expected.item(), rel=1e-6 if dtype == torch.float64 else 1e-4
    )


@pytest.mark.parametrize(("mean", "log_std"), GRID)
def test_the_entropy_is_the_integral(mean: float, log_std: float) -> None:
    _, log_density, step = density(mean, log_std)
    u, std = density(mean, log_std)[0], math.exp(log_std)
    normal = torch.exp(-0.5 * ((u - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
    expected = -(normal * log_density * step).sum()
    assert UNIT.entropy(parameters(mean, log_std)).item() == pytest.approx(
        expected.item(), abs=2e-4
    )


def test_the_entropy_is_the_mean_of_samples() -> None:
    kind = SquashedNormal((-1.0, 0.0, 2.0), (1.0, 5.0, 3.0))
    row = torch.tensor([0.3, -1.0, 0.0, -0.5, 0.2, 0.6])
    rows = row.expand(400_000, 6)
    action = kind.sample(rows, torch.Generator().manual_seed(0))
    log_prob = kind.log_prob(rows, action)
    error = log_prob.std() / math.sqrt(len(rows))
    assert (kind.entropy(row) + log_prob.mean()).abs() < 4 * error


def test_the_density_agrees_with_torch() -> None:
    kind = SquashedNormal((-1.0, -1.0), (1.0, 1.0))
    mean, log_std = torch.randn(50, 2).double(), torch.randn(50, 2).double()
    action = mean + log_std.exp() * torch.randn(50, 2).double()
    reference = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, log_std.exp()),
        torch.distributions.TanhTransform(cache_size=1),
    )
    squashed = reference.transforms[0](action)
    expected = reference.log_prob(squashed).sum(dim=-1)
    torch.testing.assert_close(kind.log_prob(torch.cat((mean, log_std), dim=-1), action), expected)


def test_samples_have_the_mean_and_the_deviation() -> None:
    rows = torch.tensor([0.5, -0.7]).expand(200_000, 2)
    action = UNIT.sample(rows, torch.Generator().manual_seed(0))
    assert action.dtype == torch.float32
    assert action.mean().item() == pytest.approx(0.5, abs=0.01)
    assert action.std().item() == pytest.approx(math.exp(-0.7), rel=0.01)
    assert torch.equal(UNIT.greedy(rows), rows[:, :1])


def test_the_slope_neither_overflows_nor_rounds_to_nothing() -> None:
    u = torch.tensor([-1e4, -200.0, -20.0, -1.0, 0.0, 1.0, 20.0, 200.0, 1e4])
    exact = 2 * (math.log(2) - u.double().abs() - (-2 * u.double().abs()).exp().log1p())
    torch.testing.assert_close(log_slope(u).double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mean", [-1e4, -30.0, 0.0, 30.0, 1e4])
@pytest.mark.parametrize("log_std", [-1e3, *LOG_STD_RANGE, 1e3])
def test_gradients_are_finite_at_the_extremes(mean: float, log_std: float) -> None:
    row = torch.tensor([mean, log_std], requires_grad=True)
    action = UNIT.sample(row.detach(), torch.Generator().manual_seed(0))
    (UNIT.log_prob(row, action) + UNIT.entropy(row)).backward()
    assert row.grad is not None
    assert row.grad.isfinite().all()


def test_gradients_agree_with_finite_differences() -> None:
    row = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    kind = SquashedNormal((-1.0, -1.0), (1.0, 1.0))
    action = torch.randn(3, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kind.log_prob(x, action), row)
    assert torch.autograd.gradcheck(kind.entropy, row)


def test_the_widest_deviation_is_bounded() -> None:
    low, high = LOG_STD_RANGE
    action = torch.tensor([0.3])
    for outside, edge in ((low - 5, low), (high + 5, high)):
        pair = [UNIT.log_prob(torch.tensor([0.2, x]), action) for x in (outside, edge)]
        assert pair[0] == pair[1]


BOUNDS = [(-1.0, 1.0), (-0.4, 0.4), (0.0, 1.0), (0.1, 0.3), (-3e38, 3e38), (5.0, 5.0)]


@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_what_the_environment_is_told_is_inside_the_bounds(low: float, high: float) -> None:
    low32, high32 = torch.tensor([low, high])
    kind = SquashedNormal((low32.item(),), (high32.item(),))
    told = kind.to_env(torch.tensor([[-3e38], [-20.0], [-9.1], [0.0], [9.1], [20.0], [3e38]]))
    assert told.dtype == torch.float32
    assert ((told >= low32) & (told <= high32)).all()
    assert told[0] == low32
    assert told[-1] == high32
    assert told[3].item() == pytest.approx(0.5 * low + 0.5 * high, rel=1e-6, abs=1e-6)


def test_the_squash_is_the_one_that_the_records_promise() -> None:
    kind = SquashedNormal((-2.0, 0.0), (2.0, 1.0))
    action = torch.randn(100, 2)
    low, high = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 1.0])
    expected = low + (action.tanh() + 1) / 2 * (high - low)
    torch.testing.assert_close(kind.to_env(action), expected)
    torch.testing.assert_close(kind.encode(action), action.tanh())
    assert (kind.encode(torch.zeros(1, 2)) == 0).all()


def test_uniform_is_uniform_between_the_bounds() -> None:
    kind = SquashedNormal((2.0,), (6.0,))
    action = kind.uniform(torch.zeros(50_000, 2), generator=torch.Generator().manual_seed(0))
    told = kind.to_env(action)
    assert action.isfinite().all()
    counts = told.histc(8, 2.0, 6.0) / len(told)
    assert counts.tolist() == pytest.approx([1 / 8] * 8, abs=0.008)
