"""Nested observations as one row of bytes, so that every pool and table holds plain arrays.

A leaf is a Box, Discrete, MultiDiscrete or MultiBinary somewhere in Dicts and Tuples. Leaves lie
one after the other, each at a multiple of 8 bytes, so that a row can be viewed as any dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from headrace.errors import ConfigError

ALIGNMENT = 8

# What torch cannot hold, or only at a price, becomes the next wider type that it can.
_STORED = {
    "float64": "float32",
    "float128": "float32",
    "longdouble": "float32",
    "uint16": "int32",
    "uint32": "int64",
    "uint64": "int64",
}
_AS_THEY_ARE = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32")


class Leaf(NamedTuple):
    """One part of an observation, and where it lies in the row."""

    path: str
    """Keys and places from the root, as "camera/left" or "0"; empty for the root itself."""
    kind: str
    """box, discrete, multi_discrete or multi_binary."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    """As it is stored: float64 as float32, choices as int64."""
    offset: int
    """Bytes from the start of the row."""
    choices: tuple[int, ...]
    """Of each number in a discrete or multi_discrete part, flattened; else empty."""
    low: float
    """Least bound of a box, else 0."""
    high: float
    """Greatest bound of a box, else 1."""
    start: tuple[int, ...]
    """First choice of each number, flattened; stored values count from 0."""
    keys: tuple[Any, ...]
    """The path as the keys themselves."""

    @property
    def nbytes(self) -> int:
        """Bytes of one value."""
        return math.prod(self.shape) * self.dtype.itemsize


def stored_dtype(dtype: np.dtype[Any] | type[Any] | None) -> np.dtype[Any]:
    """Returns the dtype in which numbers of `dtype` travel.

    Raises:
        ConfigError: they are no numbers.
    """
    name = np.dtype(dtype).name
    if name in _AS_THEY_ARE:
        return np.dtype(name)
    if name not in _STORED:
        raise ConfigError(f"observations of dtype {name} are not supported")
    return np.dtype(_STORED[name])


def is_plain(space: gym.Space[Any]) -> bool:
    """Whether observations travel as they are, not packed: a Box of what torch can hold."""
    return isinstance(space, gym.spaces.Box) and (
        space.dtype.name in _AS_THEY_ARE or space.dtype.name == "float64"
    )


def leaves(space: gym.Space[Any]) -> tuple[Leaf, ...]:
    """Returns the leaves of a space, in its own order.

    Raises:
        ConfigError: a part is of a kind that is not supported.
    """
    found: list[Leaf] = []
    offset = 0
    for keys, part in _parts(space, ()):
        leaf = _leaf(part, keys, offset)
        found.append(leaf)
        offset += -(-leaf.nbytes // ALIGNMENT) * ALIGNMENT
    paths = [leaf.path for leaf in found]
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(f"two parts of the observation are both named {path!r}")
    if not offset:
        raise ConfigError(f"observations of {space} are empty")
    return tuple(found)


def row_nbytes(leaves: Sequence[Leaf]) -> int:
    """Returns the bytes of one row, a multiple of 8."""
    end = max(leaf.offset + leaf.nbytes for leaf in leaves)
    return -(-end // ALIGNMENT) * ALIGNMENT


def packed_space(space: gym.Space[Any]) -> gym.spaces.Box:
    """Returns the space of one row: uint8 [nbytes]."""
    return gym.spaces.Box(0, 255, (row_nbytes(leaves(space)),), np.uint8)


def pack(leaves: Sequence[Leaf], value: Any, out_row: NDArray[np.uint8]) -> None:
    """Writes one observation into a row uint8 [nbytes]; gaps are left as they are.

    Raises:
        ValueError: a part is missing, has another shape, is a choice that there is not, or is a
            number that its dtype cannot hold.
    """
    views = unpack(leaves, out_row)
    for leaf in leaves:
        named = f"part {leaf.path!r} of the observation" if leaf.keys else "the observation"
        try:
            part = np.asarray(part_of(leaf, value))
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{named} is missing") from error
        if part.shape != leaf.shape:
            raise ValueError(f"{named} must be of shape {leaf.shape}, not {part.shape}")
        if leaf.choices:
            part = as_dtype(part, leaf.dtype, named) - np.reshape(leaf.start, leaf.shape)
            if (part < 0).any() or (part >= np.reshape(leaf.choices, leaf.shape)).any():
                raise ValueError(f"{named} is {part_of(leaf, value)}, which is no choice of it")
        np.copyto(views[leaf.path], as_dtype(part, leaf.dtype, named))


def as_dtype(value: Any, dtype: np.dtype[Any], named: str) -> NDArray[Any]:
    """Returns an array of `dtype`; floats may be rounded, whole numbers must stay what they are.

    Raises:
        ValueError: `named` is no numbers, or has one that an integer of `dtype` cannot hold.
    """
    given = np.asarray(value)
    if given.dtype.kind not in "fiub":
        raise ValueError(f"{named} must be numbers, not {given.dtype}")
    if given.dtype == dtype or dtype.kind == "f":
        return given.astype(dtype, copy=False)
    with np.errstate(invalid="ignore"):
        array = given.astype(dtype)
    if (array != given).any():
        odd = given[array != given].flat[0]
        raise ValueError(
            f"{named} is of {dtype}, which cannot hold {odd}: give it as the environment does"
        )
    return array


def unpack(leaves: Sequence[Leaf], rows: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Returns the parts of rows uint8 [..., nbytes] as views [..., *shape], by path."""
    return {
        leaf.path: rows[..., leaf.offset : leaf.offset + leaf.nbytes]
        .view(leaf.dtype)
        .reshape((*rows.shape[:-1], *leaf.shape))
        for leaf in leaves
    }


def nest(space: gym.Space[Any], leaves: Sequence[Leaf], row: NDArray[np.uint8]) -> Any:
    """Returns the observation that was packed into a row uint8 [nbytes], as copies.

    Dicts are dict, Tuples tuple, a Discrete an int; arrays have the space's own dtypes. What was
    lost in packing stays lost: a float64 has the precision and the range of float32.

    Args:
        space: The one that `leaves` are of.
        leaves: Its leaves.
        row: One packed observation.
    """
    parts = unpack(leaves, row)
    return _nested(space, iter(leaves), parts)


def part_of(leaf: Leaf, value: Any) -> Any:
    """Returns what a nested observation has where the leaf is."""
    for key in leaf.keys:
        value = value[key]
    return value


def _parts(
    space: gym.Space[Any], keys: tuple[Any, ...]
) -> Iterator[tuple[tuple[Any, ...], gym.Space[Any]]]:
    inside: Mapping[Any, Any]
    if isinstance(space, gym.spaces.Dict):
        inside = space.spaces
    elif isinstance(space, gym.spaces.Tuple):
        inside = dict(enumerate(space.spaces))
    else:
        yield keys, space
        return
    for key, part in inside.items():
        yield from _parts(part, (*keys, key))


def _nested(
    space: gym.Space[Any], leaves: Iterator[Leaf], parts: Mapping[str, NDArray[Any]]
) -> Any:
    """Builds a value of `space` from the next leaves, which are in the order of `_parts`."""
    if isinstance(space, gym.spaces.Dict):
        return {key: _nested(part, leaves, parts) for key, part in space.spaces.items()}
    if isinstance(space, gym.spaces.Tuple):
        return tuple(_nested(part, leaves, parts) for part in space.spaces)
    leaf = next(leaves)
    part = parts[leaf.path]
    if any(leaf.start):
        part = part + np.reshape(leaf.start, leaf.shape)
    return int(part) if leaf.kind == "discrete" else part.astype(space.dtype)


def _leaf(space: gym.Space[Any], keys: tuple[Any, ...], offset: int) -> Leaf:
    path = "/".join(str(key) for key in keys)
    at: dict[str, Any] = {"path": path, "keys": keys, "offset": offset}
    integer = np.dtype(np.int64)
    if isinstance(space, gym.spaces.Box):
        # An array without numbers has no least one.
        low, high = (space.low.min(), space.high.max()) if space.low.size else (0.0, 1.0)
        dtype = stored_dtype(space.dtype)
        return Leaf(
            kind="box",
            shape=space.shape,
            dtype=dtype,
            choices=(),
            low=float(low),
            high=float(high),
            start=(),
            **at,
        )
    at |= {"low": 0.0, "high": 1.0}
    if isinstance(space, gym.spaces.Discrete):
        choices: tuple[int, ...] = (int(space.n),)
        start: tuple[int, ...] = (int(space.start),)
        return Leaf(kind="discrete", shape=(), dtype=integer, choices=choices, start=start, **at)
    if isinstance(space, gym.spaces.MultiDiscrete):
        choices = tuple(int(count) for count in space.nvec.flat)
        start = tuple(int(first) for first in np.asarray(space.start).flat)
        shape = space.nvec.shape
        return Leaf(
            kind="multi_discrete", shape=shape, dtype=integer, choices=choices, start=start, **at
        )
    if isinstance(space, gym.spaces.MultiBinary):
        dtype = np.dtype(np.int8)
        return Leaf(kind="multi_binary", shape=space.shape, dtype=dtype, choices=(), start=(), **at)
    where = f" (part {path!r})" if path else ""
    raise ConfigError(f"observations of {type(space).__name__}{where} are not supported")
