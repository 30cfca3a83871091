"""Units of values move, and what the layer says stays."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from headrace.ops.popart import Statistics, deviation, no_statistics, preserved, updated


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_outputs_stay_while_targets_change_their_scale_by_a_million(
    dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(50, 6, generator=generator, dtype=dtype)
    weight = torch.randn(3, 6, generator=generator, dtype=dtype)
    bias = torch.zeros(3, dtype=dtype)
    statistics = no_statistics(3)

    def values() -> torch.Tensor:
        normalized = functional.linear(features, weight, bias).double()
        return normalized * deviation(statistics) + statistics.mean_N

    before = values()
    for update in range(500):
        scale = 10.0 ** (-2 + 6 * update / 499)  # 0.01 to 10 000
        target = scale * (3 + torch.randn(40, generator=generator))
        task = torch.randint(2, (40,), generator=generator)  # the third is never seen
        new = updated(statistics, target, task, step=0.01)
        weight, bias = preserved(weight, bias, statistics, new)
        statistics = new
    assert weight.dtype == bias.dtype == dtype
    assert statistics.mean_N[0] > 5_000
    # In the unit that they are learned in, to which all errors are relative.
    assert ((values() - before).abs() / deviation(statistics)).max() <= tolerance
    assert statistics.mean_N[2] == 0
    assert statistics.square_N[2] == 1
    assert torch.equal(values()[:, 2], before[:, 2])


def test_a_deviation_of_one_is_found_beside_a_mean_of_ten_thousand() -> None:
    generator = torch.Generator().manual_seed(1)
    statistics, task = no_statistics(1), torch.zeros(64, dtype=torch.int64)
    for _ in range(3_000):  # (1 - 0.01) ** 3 000 of 1e8 is nothing
        target = 1e4 + torch.randn(64, generator=generator)
        statistics = updated(statistics, target, task, step=0.01)
    assert abs(float(deviation(statistics)) - 1.0) < 0.05
    assert all(part.dtype == torch.float64 for part in statistics)


def test_a_step_is_towards_the_means_of_the_tasks_that_are_present() -> None:
    start = Statistics(
        torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 5.0, 10.0]).double()
    )
    target = torch.tensor([[4.0, 0.0], [2.0, -6.0]])
    task = torch.tensor([0, 2])  # of each column
    new = updated(start, target, task, step=0.25)
    torch.testing.assert_close(new.mean_N, torch.tensor([1.5, 2.0, 1.5]).double())
    torch.testing.assert_close(new.square_N, torch.tensor([4.0, 5.0, 12.0]).double())


def test_the_deviation_has_bounds() -> None:
    mean = torch.tensor([5.0, 0.0, 0.0]).double()
    square = torch.tensor([24.9, 1e-12, 1e20]).double()  # less than the mean's, tiny, huge
    assert deviation(Statistics(mean, square)).tolist() == [1e-4, 1e-4, 1e6]
    assert deviation(Statistics(mean, square), low=0.5, high=3.0).tolist() == [0.5, 0.5, 3.0]
