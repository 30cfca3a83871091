"""Which observations are pictures, and where height, width and channels lie: one rule for all.

A picture has two to four axes, and numbers that say how bright it is: bytes of any bound, or other
numbers from 0 to 255 or 65535, or, if they are floats or flags, from 0 to 1. Its height and width
are the two neighbouring axes of which the shorter is longest; of two such pairs the more alike; of
two that are alike the first (of four axes, the middle one). All other axes are channels: colours,
or frames that a wrapper has stacked, in the order in which they lie.

    [84, 84]          grey              [4, 84, 84, 3]    channels last, a stack of 4
    [64, 64, 3]       channels last     [4, 3, 84, 84]    channels first, a stack of 4
    [3, 64, 64]       channels first    [9, 10, 14]       channels first: the rule knows shapes only
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from headrace import tree
from headrace.specs import EnvSpec

Kinds = Literal["any", "bytes"]
"""Which pictures are told apart: all of the above, or only bytes [H, W] and [H, W, colours], taken
to go up to 255, as before 0.1.0."""

_PAIRS = {2: (0,), 3: (0, 1), 4: (1, 2, 0)}  # where height may lie, by the number of axes
_MANY_PIXELS = 32  # on each side: an array so large is hardly anything else
_BRIGHTEST = (255.0, 65535.0)  # of numbers that are not bytes


class Picture(NamedTuple):
    """How a picture lies in one observation."""

    shape: tuple[int, ...]
    """Of the observation."""
    rows: int
    """The axis of the height; that of the width follows."""
    high: float
    """The number that stands for full brightness."""

    @property
    def height(self) -> int:
        """Rows of pixels."""
        return self.shape[self.rows]

    @property
    def width(self) -> int:
        """Columns of pixels."""
        return self.shape[self.rows + 1]

    @property
    def channel_axes(self) -> tuple[int, ...]:
        """Axes of the channels, in order."""
        return tuple(i for i in range(len(self.shape)) if i not in (self.rows, self.rows + 1))

    @property
    def channels(self) -> int:
        """Numbers of one pixel."""
        return math.prod(self.shape[i] for i in self.channel_axes)

    @property
    def layout(self) -> str:
        """Where the channels lie, in words; empty where there are none."""
        first, last = self.shape[: self.rows], self.shape[self.rows + 2 :]
        stack = f", a stack of {first[0]}" if first and len(self.shape) == 4 else ""
        side = "channels last" if last else "channels first" if first else ""
        return side + stack

    def planes(self, stack: int) -> tuple[int, int, int]:
        """Returns the shape [C, H, W] of `stack` such observations as channels of one picture."""
        return stack * self.channels, self.height, self.width

    def has(self, pixels: int) -> bool:
        """Whether there are so many pixels on each side."""
        return min(self.height, self.width) >= pixels


def picture_of(leaf: tree.Leaf, kinds: Kinds = "any") -> Picture | None:
    """Returns how a part of an observation is a picture; None if it is none."""
    shape, is_bytes = leaf.shape, leaf.dtype == np.uint8
    if leaf.kind != "box" or not 2 <= len(shape) <= 4:
        return None
    if kinds == "bytes":
        return Picture(shape, 0, 255.0) if is_bytes and len(shape) < 4 else None
    scaled = leaf.dtype.kind in "fb" and leaf.high == 1.0
    if not (is_bytes or (leaf.low == 0.0 and (scaled or leaf.high in _BRIGHTEST))):
        return None
    return Picture(shape, _first_row_axis(shape), max(1.0, leaf.high))


def looks_like_one(shape: tuple[int, ...]) -> bool:
    """Whether a shape alone suggests a picture, whatever dtype and bounds say."""
    return any(min(pair) >= _MANY_PIXELS for pair in pairwise(shape))


def parts_of(spec: EnvSpec) -> tuple[tree.Leaf, ...]:
    """Returns the parts of the observations of a spec: one, where they are not nested."""
    return tree.leaves(spec.observation_space if spec.structure is None else spec.structure)


def plain_picture(spec: EnvSpec, kinds: Kinds = "any") -> Picture | None:
    """Returns how the whole observation is a picture; None if it is none, or of several parts."""
    return None if spec.structure is not None else picture_of(parts_of(spec)[0], kinds)


def _first_row_axis(shape: tuple[int, ...]) -> int:
    """Returns the axis of the height."""

    def fitness(axis: int) -> tuple[int, int]:
        pair = shape[axis : axis + 2]
        return min(pair), -max(pair)

    return max(_PAIRS[len(shape)], key=fitness)  # the first of those that are alike
