"""Running moments against numpy over everything at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headrace.ops.normalization import deviation, merged, no_moments, normalized
from headrace.ops.rewards import transform_reward


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_merging_equals_numpy_over_the_concatenation(offset: float) -> None:
    generator = np.random.default_rng(0)
    batches = [
        (generator.normal(size=(rows, 2, 3)) * scale + offset + shift).astype(np.float32)
        for rows, scale, shift in ((1, 1.0, 0.0), (50, 3.0, 5.0), (7, 0.1, -20.0), (1000, 2.0, 1.0))
    ]
    moments = no_moments((2, 3))
    for batch in batches:
        moments = merged(moments, torch.from_numpy(batch))
    everything = np.concatenate(batches).astype(np.float64)
    assert moments.total.item() == len(everything)
    np.testing.assert_allclose(moments.mean.numpy(), everything.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance.numpy(), everything.var(axis=0), rtol=1e-8)


def test_nothing_seen_is_the_identity_but_for_the_clip() -> None:
    x = torch.tensor([-30.0, -2.5, 0.0, 9.0, 30.0])
    torch.testing.assert_close(
        normalized(x, no_moments(())), torch.tensor([-10.0, -2.5, 0.0, 9.0, 10.0])
    )
    assert deviation(no_moments(())).item() == pytest.approx(1.0)


def test_what_was_seen_gets_mean_0_and_deviation_1() -> None:
    rows = torch.randn(5000, 4) * torch.tensor([1e-3, 1.0, 50.0, 1e4]) + 7.0
    y = normalized(rows, merged(no_moments((4,)), rows))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.mean(dim=0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.std(dim=0), torch.ones(4), atol=1e-2, rtol=0)


def test_a_feature_that_never_moves_is_zero() -> None:
    rows = torch.full((10, 1), 3.0)
    assert (normalized(rows, merged(no_moments((1,)), rows)) == 0).all()


def test_normalised_rewards_are_divided_not_centred() -> None:
    reward = torch.tensor([-1.0, 0.0, 4.0, 1000.0])
    expected = torch.tensor([-0.5, 0.0, 2.0, 10.0])
    torch.testing.assert_close(
        transform_reward(reward, "normalize", return_std=torch.tensor(2.0)), expected
    )
    with pytest.raises(ValueError, match="normalize"):
        transform_reward(reward, "normalize")
