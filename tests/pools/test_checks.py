"""Actions that no environment can take."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

from headrace.specs import ActionSpace, check_action

ONE = gym.spaces.Discrete(3)
VECTOR = gym.spaces.MultiDiscrete([3, 5])
BOX = gym.spaces.Box(np.float32([-1, -2]), np.float32([1, 2]))


@pytest.mark.parametrize(
    ("space", "action"),
    [
        (ONE, np.array([0, 2])),
        (VECTOR, np.array([[0, 0], [2, 4]])),
        (BOX, np.array([[-1, 2], [0.5, -2]], np.float32)),
    ],
)
def test_what_is_inside_passes(space: ActionSpace, action: np.ndarray) -> None:
    check_action(action, 2, space)


@pytest.mark.parametrize(
    ("space", "action"),
    [
        (ONE, np.array([0, 3])),
        (ONE, np.array([-1, 0])),
        (ONE, np.array([0])),
        (ONE, np.array([0, 1], np.int32)),
        (VECTOR, np.array([[0, 0], [2, 5]])),
        (VECTOR, np.array([[0, 0], [3, 4]])),
        (VECTOR, np.array([0, 1])),
        (BOX, np.array([[0, 0], [1.5, 0]], np.float32)),
        (BOX, np.array([[0, 0], [0, -2.5]], np.float32)),
        (BOX, np.array([[0, 0], [0, np.nan]], np.float32)),
        (BOX, np.zeros((2, 2))),
        (BOX, np.zeros((2, 2, 1), np.float32)),
    ],
)
def test_all_else_is_refused(space: ActionSpace, action: np.ndarray) -> None:
    with pytest.raises(ValueError, match="actions"):
        check_action(action, 2, space)
