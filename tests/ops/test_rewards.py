import math

import pytest
import torch

from headrace.ops.rewards import RewardTransform, transform_reward

REWARD = [-400.0, -2.0, -0.5, 0.0, 0.5, 2.0, 400.0]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("none", REWARD),
        ("clip", [-1.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.0]),
        ("soft_asymmetric", [5 * math.tanh(r / 5) * (0.3 if r < 0 else 1.0) for r in REWARD]),
    ],
)
def test_transform(mode: RewardTransform, expected: list[float]) -> None:
    torch.testing.assert_close(transform_reward(torch.tensor(REWARD), mode), torch.tensor(expected))
