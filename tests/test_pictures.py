"""Which observations are pictures: the rule itself."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from headrace import tree
from headrace.pictures import Kinds, Picture, picture_of


def picture(
    *shape: int, dtype: Any = np.uint8, low: float = 0, high: float = 255, kinds: Kinds = "any"
) -> Picture | None:
    return picture_of(tree.leaves(gym.spaces.Box(low, high, shape, dtype))[0], kinds)


@pytest.mark.parametrize(
    ("shape", "rows", "layout"),
    [
        ((84, 84), 0, ""),
        ((64, 64, 3), 0, "channels last"),
        ((210, 160, 3), 0, "channels last"),
        ((3, 64, 64), 1, "channels first"),
        ((3, 210, 160), 1, "channels first"),
        ((4, 84, 84), 1, "channels first"),
        ((40, 84, 84), 1, "channels first"),
        ((2, 16, 512), 1, "channels first"),
        ((84, 84, 84), 0, "channels last"),
        ((8, 8, 29), 0, "channels last"),
        ((29, 8, 8), 1, "channels first"),
        ((72, 96, 16), 0, "channels last"),
        ((84, 84, 1), 0, "channels last"),
        ((1, 84, 84), 1, "channels first"),
        ((4, 84, 84, 3), 1, "channels last, a stack of 4"),
        ((4, 3, 84, 84), 2, "channels first, a stack of 4"),
        ((12, 12, 12, 3), 1, "channels last, a stack of 12"),
        ((84, 84, 3, 4), 0, "channels last"),
    ],
)
def test_height_and_width_are_found_by_the_shape(
    shape: tuple[int, ...], rows: int, layout: str
) -> None:
    found = picture(*shape)
    assert found is not None
    assert (found.rows, found.layout) == (rows, layout)
    assert (found.height, found.width) == shape[rows : rows + 2]
    assert found.height * found.width * found.channels == np.prod(shape)
    assert found.planes(5) == (5 * found.channels, found.height, found.width)


@pytest.mark.parametrize(
    ("dtype", "low", "high", "taken_as"),
    [
        (np.uint8, 0, 255, 255),
        (np.uint8, 0, 7, 7),
        (np.uint8, 3, 200, 200),
        (np.float32, 0, 1, 1),
        (np.float64, 0, 1, 1),
        (np.float32, 0, 255, 255),
        (np.int64, 0, 255, 255),
        (np.uint16, 0, 65535, 65535),
        (np.bool_, 0, 1, 1),
        (np.float32, -1, 1, None),
        (np.float32, 0, 9, None),
        (np.float32, -np.inf, np.inf, None),
        (np.int64, 0, 1, None),
        (np.int8, -128, 127, None),
    ],
)
def test_brightness_is_found_by_dtype_and_bounds(
    dtype: Any, low: float, high: float, taken_as: float | None
) -> None:
    found = picture(20, 30, dtype=dtype, low=low, high=high)
    assert (None if found is None else found.high) == taken_as


def test_what_has_too_few_or_too_many_axes_is_no_picture() -> None:
    assert picture(400) is None
    assert picture(2, 4, 3, 64, 64) is None
    assert picture_of(tree.leaves(gym.spaces.MultiBinary((40, 40)))[0]) is None


def test_runs_of_before_go_on_with_bytes_alone() -> None:
    assert picture(3, 64, 64, high=7, kinds="bytes") == Picture((3, 64, 64), 0, 255.0)
    assert picture(64, 64, dtype=np.float32, high=1, kinds="bytes") is None
    assert picture(4, 64, 64, 3, kinds="bytes") is None
