"""EnvPool's observations and actions as every pool delivers and takes them.

What EnvPool 1.2.5 does, as measured: a bound that it does not know is the least and the greatest
positive number of the dtype; images are channels first, except where their own package has them
last; all numbers of MuJoCo are float64; actions are cast by `send`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from headrace import tree
from headrace.errors import ConfigError
from headrace.specs import ActionSpace

Array = NDArray[Any]

_MAX_CHANNELS = 4


class Observations(NamedTuple):
    """How observations travel."""

    space: gym.spaces.Box
    structure: gym.Space[Any] | None
    convert: Callable[[Any], Array]
    """From what EnvPool gives for N environments to [N, ...] of `space`."""


class Actions(NamedTuple):
    """How actions travel."""

    space: ActionSpace
    convert: Callable[[Array], Array]
    """From [N, ...] of `space` to what EnvPool takes."""


def observations(space: gym.Space[Any]) -> Observations:
    """Returns how observations of EnvPool's `space` travel.

    A single image [1, H, W] becomes a frame [H, W], and [C, H, W] becomes [H, W, C]; float64
    becomes float32; what is nested or no box becomes a row of bytes (`headrace.tree`).

    Raises:
        ConfigError: a part is of a kind that is not supported.
    """
    space = _unbounded_where_unknown(space)
    if not tree.is_plain(space):
        return Observations(tree.packed_space(space), space, _packer(space))
    assert isinstance(space, gym.spaces.Box)
    if _is_channel_first(space):
        if space.shape[0] == 1:
            return Observations(_image(space.low[0], space.high[0]), None, _first_channel)
        low, high = (np.moveaxis(bound, 0, -1) for bound in (space.low, space.high))
        return Observations(_image(low, high), None, _channels_last)
    dtype = tree.stored_dtype(space.dtype)
    low, high = space.low.astype(dtype), space.high.astype(dtype)
    plain = gym.spaces.Box(low, high, dtype=dtype.type)
    return Observations(plain, None, lambda value: value.astype(dtype, copy=False))


def actions(name: str, space: gym.Space[Any]) -> Actions:
    """Returns how actions of EnvPool's `space` travel.

    Raises:
        ConfigError: `name` takes actions that no policy here gives.
    """
    space = _unbounded_where_unknown(space)
    if isinstance(space, gym.spaces.Discrete):
        start = space.start
        return Actions(gym.spaces.Discrete(space.n), lambda action: action + start)
    if not isinstance(space, gym.spaces.Box):
        raise ConfigError(f"{name}: actions of {type(space).__name__} are not supported")
    shape = space.shape
    if np.issubdtype(space.dtype, np.integer):
        first = space.low.reshape(-1).astype(np.int64)
        counts = space.high.reshape(-1).astype(np.int64) - first + 1
        return Actions(
            gym.spaces.MultiDiscrete(counts), lambda action: (action + first).reshape(-1, *shape)
        )
    low, high = (bound.astype(np.float32) for bound in (space.low, space.high))
    flat = gym.spaces.Box(low.reshape(-1), high.reshape(-1), dtype=np.float32)
    return Actions(flat, lambda action: action.reshape(-1, *shape))


def _unbounded_where_unknown(space: gym.Space[Any]) -> gym.Space[Any]:
    """Returns the space with infinite bounds for floats of which EnvPool knows none."""
    if isinstance(space, gym.spaces.Dict):
        parts = {key: _unbounded_where_unknown(part) for key, part in space.spaces.items()}
        return gym.spaces.Dict(parts)
    if not isinstance(space, gym.spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        return space
    limits = np.finfo(space.dtype)
    low = np.where(np.isin(space.low, (limits.tiny, limits.min)), -np.inf, space.low)
    high = np.where(space.high == limits.max, np.inf, space.high)
    kind: Any = space.dtype.type
    return gym.spaces.Box(low.astype(kind), high.astype(kind), dtype=kind)


def _is_channel_first(space: gym.spaces.Box) -> bool:
    shape = space.shape
    image = space.dtype == np.uint8 and len(shape) == 3
    return image and shape[0] <= _MAX_CHANNELS < min(shape[1:])


def _image(low: Array, high: Array) -> gym.spaces.Box:
    return gym.spaces.Box(low, high, dtype=np.uint8)


def _first_channel(value: Array) -> Array:
    return value[:, 0]


def _channels_last(value: Array) -> Array:
    return np.ascontiguousarray(np.moveaxis(value, 1, -1))


def _packer(space: gym.Space[Any]) -> Callable[[Any], Array]:
    leaves = tree.leaves(space)
    nbytes = tree.row_nbytes(leaves)

    def pack(value: Any) -> Array:
        parts = [tree.part_of(leaf, value) for leaf in leaves]
        rows = np.zeros((len(parts[0]), nbytes), np.uint8)
        views = tree.unpack(leaves, rows)
        for leaf, part in zip(leaves, parts, strict=True):
            begun = part - np.reshape(leaf.start, leaf.shape) if any(leaf.start) else part
            view = views[leaf.path]
            np.copyto(view, np.reshape(begun, view.shape), casting="unsafe")
        return rows

    return pack
